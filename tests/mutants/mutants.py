"""Wrong versions of the product, one mistake each, and the fast test that must fail under it.

What laws/wrong.py is for Algorithm 1 this is for the rest of the house: mistakes that somebody could make, none of
which gives the right numbers in the end. A row keeps the dotted name of what it changes; where that moves, or its text
is written otherwise, the row says that it is stale and is adapted.
"""

from typing import NamedTuple

import numpy as np

from change import Change, both, code, constant, entry
from fedmom.method.states.policies import start_local

# The fast tests that `python tests/mutants` runs under every mutant of a part: where its laws are stated.
PARTS = {
    "algorithm 1": (
        "tests/laws",
        "tests/method/test_algorithms.py",
        "tests/method/test_correction.py",
        "tests/engine/test_engine.py",
        "tests/config/test_config.py::test_baselines_mean_what_their_names_say",
        "tests/config/test_config.py::test_intervals_are_the_theorems_floors_in_exact_arithmetic",
    ),
    "algorithm 2": (
        "tests/laws/test_backends.py",
        "tests/method/test_topology.py",
        "tests/engine/test_gossip.py",
        "tests/flower/test_relay.py",
    ),
    "averaging": ("tests/method/test_averaging.py", "tests/engine/test_engine.py", "tests/laws"),
    "stack": ("tests/engine/test_stacked.py", "tests/engine/test_transformers.py", "tests/tasks/test_adapters.py"),
    "optimizers": ("tests/method/test_optimizers.py", "tests/engine/test_stacked_optimizers.py"),
    "replays": ("tests/engine/test_cuda_graphs.py", "tests/engine/test_noise.py"),
    "batches": ("tests/data/test_batches.py", "tests/tasks/test_dropout.py", "tests/tasks/test_supervised.py"),
    "partitions": ("tests/data/test_partition.py",),
    "schedules": ("tests/method/test_schedules.py", "tests/engine/test_engine.py", "tests/laws"),
    "named": ("tests/laws/test_presets.py", "tests/method/test_named_corrections.py", "tests/config/test_named.py"),
    "rounds": (
        "tests/laws/test_backends.py",
        "tests/laws/test_memory.py",
        "tests/engine/test_engine.py",
        "tests/engine/test_gossip.py",
        "tests/runs/test_run.py",
    ),
    "resume": ("tests/runs/test_resume.py", "tests/records", "tests/engine/test_gossip.py"),
    "failures": (
        "tests/flower/test_failures.py",
        "tests/flower/test_flower.py",
        "tests/flower/test_lost_rows.py",
        "tests/flower/test_relay.py",
        "tests/flower/test_replies.py",
        "tests/flower/test_strategies_alone.py",
    ),
    "identity": ("tests/records/test_identity.py",),
    "history": ("tests/records/test_history.py", "tests/runs/test_resume.py"),
    "records": ("tests/records", "tests/runs/test_run.py"),
    "every client": (
        "tests/tasks/test_own_results.py",
        "tests/flower/test_every_client.py",
        "tests/records/test_history.py",
        "tests/results/test_clients.py",
    ),
    "personal": ("tests/laws/test_personal_rounds.py", "tests/tasks/test_personal.py"),
    "fragments": ("tests/method/test_fragments.py",),
    "periods": (
        "tests/laws/test_states.py",
        "tests/laws/test_outer.py",
        "tests/laws/test_states_of_backends.py",
        "tests/runs/test_resume_states.py",
    ),
    "intervals": ("tests/method/test_intervals.py",),
    "codecs": ("tests/travel", "tests/laws/test_codecs.py"),
}


class Mutant(NamedTuple):
    part: str  # of PARTS
    name: str
    breaks: str  # what is wrong then, in words
    change: Change
    test: str  # the node id of a test that must fail


ALGORITHMS, AVERAGING, SCHEDULES = "fedmom.method.algorithms", "fedmom.method.averaging", "fedmom.method.schedules"
STEP, CORRECTIONS, OUTER = "fedmom.method.step", "fedmom.method.corrections", "fedmom.method.outer"
SGD, STATES, GOSSIPED = "fedmom.method.optimizers.sgd", "fedmom.method.states", "fedmom.method.decentralized"
TOPOLOGY, GRAPHS, MIXING = f"{GOSSIPED}.topology", f"{GOSSIPED}.graphs", f"{GOSSIPED}.mixing"
ALGORITHMS, AVERAGING, MIXING = (
    "fedmom.method.algorithms",
    "fedmom.method.averaging",
    "fedmom.method.decentralized.mixing",
)
TOPOLOGY, GRAPHS, SCHEDULES = (
    "fedmom.method.decentralized.topology",
    "fedmom.method.decentralized.graphs",
    "fedmom.method.schedules",
)
INTERVALS = "tests/method/test_intervals.py"
FRAGMENTS = "tests/method/test_fragments.py"
LOOP, PLAN = "fedmom.rounds.loop", "fedmom.rounds.plan"
TRAVEL, CODED = "fedmom.travel", "tests/laws/test_codecs.py"
MESSAGES = "tests/travel/test_messages.py"
EACH_CODEC, FEEDBACK = "tests/travel/test_each_codec.py", "tests/travel/test_feedback.py"
ENGINE, GOSSIP = "fedmom.engine.engine.Engine", "fedmom.engine.gossip"
FOLDED, ADAPTERS = "fedmom.engine.stacked.folded", "fedmom.tasks.models.adapters"
STACK, WENT = "fedmom.engine.stacked.steps.Stack", "fedmom.engine.stacked.means.RoundSums"
UPDATES, REPLAYS = "fedmom.engine.stacked.updates.sgd", "fedmom.engine.stacked.cuda_graphs.Replays"
RECORDING, AGREEMENT = "fedmom.engine.stacked.cuda_graphs._Recording", "fedmom.engine.stacked.agreement"
PLAIN = "fedmom.engine.engine.PlainRunner"
BATCHES, PARTITION, TASK = "fedmom.data.batches", "fedmom.data.partition", "fedmom.tasks.supervised.Supervised"
FOLDER, HISTORY, IDENTITY = "fedmom.records.folder.RunFolder", "fedmom.records.history", "fedmom.records.identity"
RUN, STATUS, FILES = "fedmom.runs.execute._Run", "fedmom.records.status", "fedmom.records.files"
LEDGER, LOST = "strategies.at_nodes.ledger", "tests/flower/test_lost_rows.py"
PRSGDM, DSGDM, CLIENTS = "strategies.prsgdm.PRSGDM", "strategies.dsgdm.DSGDM", "strategies.fleet.Fleet"
HELD_OUT, EVALUATION = "fedmom.data.given.held_out", "fedmom.tasks.evaluation"
LOOK, RESULTS, OWN = "fedmom.rounds.clients", "fedmom.rounds.results", "fedmom.rounds.own"
OWN_DATA = "strategies.local_data.LocalSupervised"

NAMED, PRESETS = "fedmom.method.named", "tests/laws/test_presets.py"
OPTIMIZERS, OTHERS = "fedmom.method.optimizers", "fedmom.engine.stacked.updates.fused"

LAWS, STACKED = "tests/method/test_optimizers.py", "tests/engine/test_stacked_optimizers.py"
OWN_TESTS, PERSONAL_ROUNDS = "tests/tasks/test_own_results.py", "tests/laws/test_personal_rounds.py"
HOLDS_OUT = f"{OWN_TESTS}::test_every_client_holds_out_its_share_and_no_other_client_matters"
ON_ITS_OWN = f"{OWN_TESTS}::test_x_is_judged_on_every_clients_own_examples"
EACH_ITS_OWN = f"{OWN_TESTS}::test_clients_own_models_are_judged_each_on_its_own_examples"
STATISTICS = f"{OWN_TESTS}::test_statistics_are_those_of_the_clients_that_have_examples"
STEPS = f"{OWN_TESTS}::test_personal_steps_are_plain_torchs_from_x_and_u"
TOLD = f"{OWN_TESTS}::test_a_run_tells_and_keeps_them_and_a_resumed_one_has_the_same"
PLAIN_ROUNDS = f"{PERSONAL_ROUNDS}::test_rounds_are_the_loops_of_plain_torch[loop]"
CONTENT = "tests/records/test_identity.py::test_other_content_of_what_the_configuration_names_is_refused_by_key"

_DECAY = (
    "    if weight_decay and not by.decoupled:\n"
    "        grads = {name: g + weight_decay * state.params[name] for name, g in grads.items()}\n"
)
_WITH_STATE = (
    "    if isinstance(correction, Correction):\n"
    "        grads, own = corrected(correction, grads, state, start or {}, server or {}, key)\n"
    "        state = state._replace(correction=own)\n"
    "    elif correction is not None:\n        assert start is not None\n"
    '        more = {} if key is None else {"key": key}\n'
)
_CORRECTED = "        grads = correction(grads, state.params, start, **more)\n"
_POLICIES = f"{STATES}.policies.MOMENTUM_POLICIES"
RULES, OWN_ROWS = "fedmom.method.states.rules.Rules", "fedmom.rounds.own"
STATE_LAWS, OUTER_LAWS = "tests/laws/test_states.py", "tests/laws/test_outer.py"

OUTER_ROUNDS = "fedmom.rounds.outer"

MUTANTS = [
    # --- algorithm 1 ---------------------------------------------------------------------------------------
    Mutant(
        "algorithm 1",
        "momentum is kept local under `average`",
        "every client goes on with its own u where it must restart from û",
        entry(_POLICIES, "average", lambda row: row._replace(start=start_local, keeps_rows=True)),
        "tests/laws/test_method.py::test_interval_one_is_large_batch_momentum_sgd",
    ),
    Mutant(
        "algorithm 1",
        "lr inside the momentum",
        "u ← βu + γg: a schedule changes the memory too",
        both(
            code(
                f"{SGD}.sgd",
                '    u = by.beta * states["u"] + g\n',
                '    g = lr * g\n    u = by.beta * states["u"] + g\n    lr = 1.0\n',
            ),
        ),
        "tests/laws/test_method.py::test_interval_one_is_large_batch_momentum_sgd",
    ),
    Mutant(
        "algorithm 1",
        "option II takes the old u",
        "v = βu + g with u before the step",
        code(f"{SGD}.sgd", "by.beta * u + g if", 'by.beta * states["u"] + g if'),
        "tests/laws/test_method.py::test_interval_one_is_large_batch_momentum_sgd",
    ),
    Mutant(
        "algorithm 1",
        "weight decay is not multiplied by the lr's share",
        "decoupled decay (x ← x − λx) in place of λx inside g",
        code(
            f"{STEP}.local_step",
            _DECAY,
            "    if weight_decay:\n        state = state._replace(params={n: x - lr * weight_decay * x "
            "for n, x in state.params.items()})\n",
        ),
        "tests/method/test_algorithms.py::test_weight_decay_is_in_the_gradient_as_in_torch_sgd",
    ),
    Mutant(
        "algorithm 1",
        "the correction comes before weight decay",
        "λx is added to what the correction made",
        code(
            f"{STEP}.local_step",
            _DECAY + _WITH_STATE + _CORRECTED,
            _WITH_STATE + _CORRECTED + _DECAY,
        ),
        "tests/method/test_algorithms.py::test_a_correction_is_of_the_gradient_with_its_weight_decay",
    ),
    Mutant(
        "algorithm 1",
        "the correction sees x twice",
        "it is given x where it must be given x at the start of the round",
        code(
            f"{STEP}.local_step",
            "correction(grads, state.params, start,",
            "correction(grads, state.params, state.params,",
        ),
        "tests/method/test_correction.py::test_fedprox_on_quadratics_is_the_recursion_written_out[loop-False-3]",
    ),
    Mutant(
        "algorithm 1",
        "the correction's key is the round's",
        "noise is the same in every step of a round",
        code(
            f"{PLAIN}._run_chunk",
            "random_bits(job.clients, job.first_steps + s)",
            "random_bits(job.clients, job.first_steps)",
        ),
        "tests/method/test_correction.py::test_addressed_noise_is_the_same_on_every_path_and_another_for_every_client_step_and_seed",
    ),
    Mutant(
        "algorithm 1",
        "slow momentum forgets",
        "u_s ← (x − x̂)/γ: α is ignored",
        code(f"{OUTER}.slowmo", 'by.momentum * memory["b"][name] + (x - mean[name]) / lr', "(x - mean[name]) / lr"),
        "tests/method/test_algorithms.py::test_slow_momentum_by_hand",
    ),
    Mutant(
        "algorithm 1",
        "the interval for distinct data is that of identical data",
        "theory-non-iid takes T^(1/2)/N^(3/2)",
        code(f"{ALGORITHMS}.theory_interval", '"theory-non-iid": math.isqrt(root)', '"theory-non-iid": root'),
        "tests/config/test_config.py::test_intervals_are_the_theorems_floors_in_exact_arithmetic",
    ),
    Mutant(
        "algorithm 1",
        "local SGD has momentum",
        "local-sgd no longer means β = 0",
        entry(f"{ALGORITHMS}.ALGORITHMS", "local-sgd", lambda row: row._replace(beta=None)),
        "tests/config/test_config.py::test_baselines_mean_what_their_names_say",
    ),
    Mutant(
        "algorithm 1",
        "average resets",
        "policy `average` starts rounds from u = 0",
        entry(_POLICIES, "average", lambda row: row._replace(start=lambda mean: {n: u * 0 for n, u in mean.items()})),
        "tests/laws/test_method.py::test_interval_one_is_large_batch_momentum_sgd",
    ),
    Mutant(
        "algorithm 1",
        "a client of a cohort gets the momentum of its place",
        "under `local` row k of the table goes to the k-th of the cohort",
        code(f"{PLAN}.round_job", "rows_of(own, job.clients)", "rows_of(own, torch.arange(len(job.clients)))"),
        "tests/laws/test_backends.py::test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum[loop]",
    ),
    Mutant(
        "algorithm 1",
        "a cohort's momenta are put back by place",
        "under `local` the k-th of the cohort writes row k",
        code(f"{OWN}.next_rows", "index_copy(0, job.clients,", "index_copy(0, torch.arange(len(job.clients)),"),
        "tests/laws/test_backends.py::test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum[loop]",
    ),
    Mutant(
        "algorithm 1",
        "the same cohort every round",
        "cohorts go by the seed alone",
        code(f"{PLAN}.cohort", "random_bits(COHORT, seed, round_index,", "random_bits(COHORT, seed, 0,"),
        "tests/engine/test_engine.py::test_cohorts_are_addressed_sorted_and_fair",
    ),
    Mutant(
        "algorithm 1",
        "the same cohorts for every seed",
        "cohorts go by the round alone",
        code(f"{PLAN}.cohort", "random_bits(COHORT, seed, round_index,", "random_bits(COHORT, 0, round_index,"),
        "tests/engine/test_engine.py::test_cohorts_are_addressed_sorted_and_fair",
    ),
    Mutant(
        "algorithm 1",
        "a step too many",
        "with unequal numbers of steps a client that is done takes one more",
        code(f"{PLAIN}._run_chunk", "active = s < num_steps", "active = s <= num_steps"),
        "tests/laws/test_backends.py::test_clients_take_as_many_steps_as_their_epochs_have[vmap]",
    ),
    # --- named methods ---------------------------------------------------------------------------------------
    Mutant(
        "named",
        "half of FedProx's pull",
        "μ/2 (x − x_start) for the gradient of μ/2 ‖x − x_start‖²",
        code(f"{NAMED}.fedprox.FedProx.__call__", "self.mu *", "self.mu / 2 *"),
        f"{PRESETS}::test_where_nothing_moves_any_more",
    ),
    Mutant(
        "named",
        "the folded FedProx has no pull",
        "stacked clients take plain steps",
        code(f"{STACK}._held", "alpha=self.pull.mu", "alpha=0"),
        f"{PRESETS}::test_rounds_of_examples_are_the_naive_loops[stack]",
    ),
    Mutant(
        "named",
        "SCAFFOLD forgets c_i − c",
        "c_i⁺ = (x − y_i)/(Iγ), which is the corrected gradient's mean and not the gradient's",
        code(
            f"{NAMED}.scaffold.Scaffold.finish",
            'client[f"c {name}"] + change',
            "server[name] + change",
        ),
        f"{PRESETS}::test_where_nothing_moves_any_more",
    ),
    Mutant(
        "named",
        "SCAFFOLD divides by the cohort",
        "c moves by the cohort's mean change, so that it is not the mean of all c_i",
        code(f"{NAMED}.scaffold.Scaffold.gather", "share *", "1 *"),
        f"{PRESETS}::test_rounds_of_examples_are_the_naive_loops[loop]",
    ),
    Mutant(
        "named",
        "SCAFFOLD's displacement with momentum",
        "(x − y_i)/(Iγ) with β > 0 grows with what u remembers, and diverges",
        code(f"{NAMED}.table._scaffold", "and by.beta == 0", ""),
        f"{PRESETS}::test_where_nothing_moves_any_more",
    ),
    Mutant(
        "named",
        "FedNova counts τ_i with momentum",
        "a_i = τ_i, as if u had no memory",
        code(f"{NAMED}.fednova.lengths", "(1 - beta**k) / (1 - beta)", "1"),
        f"{PRESETS}::test_fednova_counts_the_steps_that_momentum_makes_longer",
    ),
    Mutant(
        "named",
        "FedNova has all clients' τ_eff in a cohort",
        "x moves by the mean way per step, times everybody's steps",
        code(f"{NAMED}.fednova.of_a_cohort", "factor = ", "factor = 1.0 or "),
        f"{PRESETS}::test_rounds_of_examples_are_the_naive_loops[loop]",
    ),
    Mutant(
        "named",
        "FedNova's ways are left as they are",
        "the plain mean, which favours clients that take more steps",
        code("fedmom.rounds.plan._scales", "not plan.normalised", "True"),
        f"{PRESETS}::test_where_nothing_moves_any_more",
    ),
    Mutant(
        "named",
        "FedCM's α and 1 − α swapped",
        "a step of (1−α)g + αD",
        code(
            f"{NAMED}.fedcm.FedCM.gradient",
            "self.alpha * g[name] + (1 - self.alpha) * d",
            "(1 - self.alpha) * g[name] + self.alpha * d",
        ),
        f"{PRESETS}::test_where_nothing_moves_any_more",
    ),
    Mutant(
        "named",
        "D of x after the outer step",
        "FedCM's D follows what the server made of x̂, and not what clients stepped by",
        code(
            f"{LOOP}.after_round",
            "outer_step(plan.method, plan.outer, begun, state, outer, done.round + 1, job.lrs[0])\n",
            "outer_step(plan.method, plan.outer, begun, state, outer, done.round + 1, job.lrs[0])\n"
            "        state = gathered(\n"
            "            plan.method, done.state, state._replace(correction=mean.correction), share, job,\n"
            "            begun.params)\n",
        ),
        "tests/method/test_named_corrections.py::test_a_correction_of_ones_own_may_forget_and_be_told_of_the_round",
    ),
    Mutant(
        "named",
        "FedCM is told of no round",
        "D stays 0: local SGD at αγ, which ends at the same x, later",
        code("fedmom.rounds.correction.gathered", '"x_mean": mean.params', '"x_mean": shared'),
        f"{PRESETS}::test_golden_rounds",
    ),
    Mutant(
        "named",
        "MimeLite takes the last gradient",
        "the gradient where the client ended, and not at x before the round",
        code(f"{NAMED}.mime.MimeLite.gradient", "torch.zeros_like(client[_FIRST])", "client[_FIRST]"),
        f"{PRESETS}::test_where_nothing_moves_any_more",
    ),
    Mutant(
        "named",
        "MimeLite keeps what lives within a round",
        "the first gradient of the round before counts as this one's",
        code("fedmom.method.corrections.lasting", "if not correction.forgets(name)", ""),
        "tests/method/test_named_corrections.py::test_a_correction_of_ones_own_may_forget_and_be_told_of_the_round",
    ),
    Mutant(
        "named",
        "gradient tracking leaves y at home",
        "x alone is mixed by W, so that clients end beside the optimum",
        entry(
            f"{OPTIMIZERS}.table.OPTIMIZERS",
            "gradient-tracking",
            lambda row: row._replace(rules={**row.rules, "y": row.rules["g"]}),
        ),
        f"{PRESETS}::test_algorithm_2s_presets_are_the_naive_loops",
    ),
    Mutant(
        "named",
        "a preset overrules the configuration",
        "algorithm.beta = 0.5 is lost beside algorithm.name = 'fedprox'",
        code("fedmom.config.method.named._settle_preset", "told = now != default", "told = False"),
        "tests/config/test_named.py::test_what_wins_over_a_name_is_told",
    ),
    Mutant(
        "named",
        "SCAFFOLD corrects what is personal",
        "other clients' gradients move a layer that is a client's own, and travel",
        code("fedmom.method.corrections.started", "if correction.shared_alone", "if False"),
        "tests/method/test_named_corrections.py::test_what_stays_with_a_client_is_corrected_by_nobody",
    ),
    # --- algorithm 2 ---------------------------------------------------------------------------------------
    Mutant(
        "algorithm 2",
        "W transposed",
        "i takes of j what j should take of i",
        code(
            f"{MIXING}.Block.matrix",
            "[self.rows, self.columns]",
            "[self.columns, self.rows] if self.shape[0] == self.shape[1] else [self.rows, self.columns]",
        ),
        "tests/engine/test_gossip.py::test_a_directed_ring_tells_w_from_its_transpose_and_the_order",
    ),
    Mutant(
        "algorithm 2",
        "always W_0",
        "the first matrix of a period in every round",
        code(f"{TOPOLOGY}.Topology.at", "round_index % len(self.matrices)", "0"),
        "tests/method/test_topology.py::test_a_sweep_of_the_one_peer_graph_averages_exactly",
    ),
    Mutant(
        "algorithm 2",
        "W_t one round late",
        "round t mixes with W of round t − 1",
        code(
            f"{GOSSIP}.GossipRounds.run_round",
            "self.topology.at(job.round_index)",
            "self.topology.at(job.round_index - 1)",
        ),
        "tests/engine/test_gossip.py::test_the_engine_is_algorithm_2_step_by_step",
    ),
    Mutant(
        "algorithm 2",
        "the relay's W_t one round early",
        "Flower's rounds count from 1, and W from 0",
        code(f"{DSGDM}._mix", "self.topology.at(server_round - 1)", "self.topology.at(server_round)"),
        "tests/laws/test_backends.py::test_rounds_are_the_naive_loops[relay]",
    ),
    Mutant(
        "algorithm 2",
        "u is not mixed",
        "policy `average` mixes x alone",
        entry(_POLICIES, "average", lambda row: row._replace(exchange=lambda rows: rows.own)),
        "tests/engine/test_gossip.py::test_the_engine_is_algorithm_2_step_by_step",
    ),
    Mutant(
        "algorithm 2",
        "u is mixed twice",
        "u times W times W",
        code(
            f"{MIXING}.combine",
            "mix=partial(_mixed, apply, {",
            "mix=partial(_mixed, lambda u: apply(apply(u)), {",
        ),
        "tests/engine/test_gossip.py::test_the_engine_is_algorithm_2_step_by_step",
    ),
    Mutant(
        "algorithm 2",
        "combine, then adapt",
        "x before the step is mixed, and each client adds its own step to it",
        code(
            f"{MIXING}.combine",
            "_mixed(apply, x)",
            "{name: apply(before.params[name]) + one - before.params[name] for name, one in x.items()}",
        ),
        "tests/engine/test_gossip.py::test_a_directed_ring_tells_w_from_its_transpose_and_the_order",
    ),
    Mutant(
        "algorithm 2",
        "two policies' rows are swapped",
        "`local` resets and `reset` keeps",
        both(
            entry(
                _POLICIES,
                "local",
                lambda row: row._replace(exchange=lambda rows: {n: u * 0 for n, u in rows.own.items()}),
            ),
            entry(_POLICIES, "reset", lambda row: row._replace(exchange=lambda rows: rows.own)),
        ),
        "tests/engine/test_gossip.py::test_a_policy_is_one_row_of_one_table",
    ),
    Mutant(
        "algorithm 2",
        "quasi-global momentum without its share",
        "(x − x⁺)/γ enters with weight 1 and not 1 − β",
        code(f"{STATES}.policies.exchange_quasi_global", "(1 - rows.beta) / rows.lr", "1 / rows.lr"),
        "tests/engine/test_gossip.py::test_quasi_global_momentum_is_the_published_recursion",
    ),
    Mutant(
        "algorithm 2",
        "quasi-global momentum travels",
        "bytes of u are counted though nothing but x is sent",
        entry(_POLICIES, "quasi-global", lambda row: row._replace(sends_momentum=True)),
        "tests/engine/test_gossip.py::test_bytes_are_those_of_the_rounds_own_links",
    ),
    Mutant(
        "algorithm 2",
        "mixed variances are not pooled",
        "running_var is Σ w var, without the spread of the means",
        code(f"{MIXING}.mix_buffers", "    if pooled:\n", "    if False:\n"),
        "tests/engine/test_gossip.py::test_buffers_are_mixed_with_their_variance_pooled",
    ),
    Mutant(
        "algorithm 2",
        "the weights of links are one over the larger degree",
        "Metropolis without the 1 for the client itself: W is periodic on regular graphs",
        entry(
            f"{GRAPHS}.WEIGHTS", "metropolis", lambda _: lambda degrees, a, b: 1.0 / np.maximum(degrees[a], degrees[b])
        ),
        "tests/method/test_topology.py::test_every_topology_is_right_at_every_size_or_names_the_sizes_that_fit",
    ),
    Mutant(
        "algorithm 2",
        "a directed ring turns the other way",
        "i sends to i − 1",
        code(f"{TOPOLOGY}.from_hops", "(everybody + hop) % num_clients", "(everybody - hop) % num_clients"),
        "tests/method/test_topology.py::test_the_directed_ring_sends_to_the_next",
    ),
    Mutant(
        "algorithm 2",
        "columns of W are not checked",
        "a matrix that does not keep consensus is taken",
        code(
            f"{TOPOLOGY}.check",
            '(0, "column", "consensus would not last")',
            '(1, "column", "consensus would not last")',
        ),
        "tests/method/test_topology.py::test_matrices_that_are_refused",
    ),
    Mutant(
        "algorithm 2",
        "a link that failed takes its weight along",
        "neither diagonal gets it, and rows sum to less than 1",
        code(
            f"{TOPOLOGY}.Mixing.without",
            "self._replace(targets=np.where(away, self.sources, self.targets))",
            "self._replace(weights=np.where(away, 0.0, self.weights))",
        ),
        "tests/method/test_topology.py::test_without_links_a_symmetric_matrix_stays_doubly_stochastic",
    ),
    Mutant(
        "algorithm 2",
        "every W is symmetric",
        "links of a directed W are left out, which changes its sums",
        code(
            f"{TOPOLOGY}.Mixing.is_symmetric",
            "return bool((np.abs(weights[one] - weights[other]) <= TOLERANCE).all())",
            "return True",
        ),
        "tests/method/test_topology.py::test_symmetry_and_parts_are_those_of_the_dense_matrix",
    ),
    Mutant(
        "algorithm 2",
        "|λ₂| of a whole period is called that of a round",
        "the root over the period is not taken",
        code(f"{TOPOLOGY}.Topology.second_eigenvalue", "float(largest ** (1 / self.period))", "float(largest)"),
        "tests/method/test_topology.py::test_second_eigenvalues_that_are_known",
    ),
    Mutant(
        "algorithm 2",
        "random graphs ignore the seed",
        "every seed has the same graph",
        code(f"{GRAPHS}._connected", "draw(options.seed * 1_000_003 + attempt)", "draw(attempt)"),
        "tests/method/test_topology.py::test_random_graphs_go_by_the_seed",
    ),
    Mutant(
        "algorithm 2",
        "disagreement is summed",
        "Σ ‖x_i − x̄‖² is not divided by N",
        code(
            f"{MIXING}.spread", "return total / max(1, len(next(iter(rows.values()), torch.empty(1))))", "return total"
        ),
        "tests/engine/test_gossip.py::test_disagreement_is_the_mean_squared_distance_from_the_mean",
    ),
    Mutant(
        "algorithm 2",
        "disagreement is measured after the exchange",
        "consensus_distance is of the mixed rows",
        code(
            f"{GOSSIP}.outcome_of", "consensus_distance=spread(after.params)", "consensus_distance=spread(mixed.params)"
        ),
        "tests/engine/test_gossip.py::test_a_run_records_what_it_did",
    ),
    Mutant(
        "algorithm 2",
        "a sparse block takes its senders by place",
        "a worker that holds some clients reads the rows of others",
        code(
            f"{MIXING}.Block.__init__",
            "self.columns = np.searchsorted(senders, mixing.sources[kept])",
            "self.columns = mixing.sources[kept] % len(senders)",
        ),
        "tests/engine/test_gossip.py::test_blocks_of_receivers_give_their_part_of_the_product",
    ),
    Mutant(
        "algorithm 2",
        "bytes count a client's own share",
        "num_links counts the diagonal of W",
        code(f"{TOPOLOGY}.Mixing.num_links", "int((self.sources != self.targets).sum())", "len(self.sources)"),
        "tests/method/test_topology.py::test_every_topology_is_right_at_every_size_or_names_the_sizes_that_fit",
    ),
    Mutant(
        "algorithm 2",
        "bytes are those of W_0",
        "a round's links are counted on the first matrix of the period",
        code(f"{PLAN}.Plan.bytes_sent", "self.topology.at(round_index)", "self.topology.at(0)"),
        "tests/engine/test_gossip.py::test_bytes_are_those_of_the_rounds_own_links",
    ),
    # --- averaging -----------------------------------------------------------------------------------------
    Mutant(
        "averaging",
        "unweighted where weights are asked",
        "the mean takes 1/K for every client",
        code(f"{AVERAGING}._Moments.add", "torch.tensordot(weights, rows.to(F64), 1)", "rows.to(F64).mean(0) * chunk"),
        "tests/method/test_averaging.py::test_means_and_spreads_are_the_textbook_ones_however_rows_are_split",
    ),
    Mutant(
        "averaging",
        "buffers are unweighted",
        "x and u by weights, BatchNorm's statistics by 1/K",
        code(
            f"{AVERAGING}.WeightedMean.add",
            "moments.add(value, weights, chunk)",
            'moments.add(value, weights if part != "buffers" else weights * 0 + chunk / len(weights), chunk)',
        ),
        "tests/method/test_averaging.py::test_pooled_variance_formula_with_weights",
    ),
    Mutant(
        "averaging",
        "momentum is unweighted",
        "x by weights, u by 1/K",
        code(
            f"{AVERAGING}.WeightedMean.add",
            "moments.add(value, weights, chunk)",
            'moments.add(value, weights if part != "momentum" else weights * 0 + chunk / len(weights), chunk)',
        ),
        "tests/method/test_averaging.py::test_means_and_spreads_are_the_textbook_ones_however_rows_are_split",
    ),
    Mutant(
        "averaging",
        "client weights are ignored",
        "client-weights = samples weighs all alike",
        code(
            f"{PLAN}.Plan.weights_of",
            'sizes if self.client_weights == "samples" else np.ones(len(sizes))',
            "np.ones(len(sizes))",
        ),
        "tests/laws/test_backends.py::test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum[vmap]",
    ),
    Mutant(
        "averaging",
        "clients are always weighed by their samples",
        "client-weights = uniform is not the paper's 1/N",
        code(f"{PLAN}.Plan.weights_of", 'sizes if self.client_weights == "samples" else np.ones(len(sizes))', "sizes"),
        "tests/laws/test_backends.py::test_rounds_are_the_naive_loops[loop]",
    ),
    Mutant(
        "averaging",
        "weights of the first chunk for all",
        "a chunk's clients are weighed by those of the first",
        code(
            f"{PLAIN}.from_start",
            "part = part_of(job, places, self.problem.device)\n",
            "part = part_of(job, places, self.problem.device)._replace(weights=job.weights[: len(places)])\n",
        ),
        "tests/laws/test_backends.py::test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum[vmap]",
    ),
    Mutant(
        "averaging",
        "the last chunk twice",
        "a chunk that is not full counts double",
        code(
            f"{ENGINE}._add_up",
            "add(chunk.ended, chunk.weights)",
            "add(chunk.ended, chunk.weights * (1 + (len(chunk.weights) < self.chunk_size)))",
        ),
        "tests/engine/test_engine.py::test_any_chunk_size_gives_the_same_numbers",
    ),
    Mutant(
        "averaging",
        "running_var by mean where it is pooled",
        "the spread of the means is left out of the variance",
        code(f"{AVERAGING}.WeightedMean.mean", "        if self.pooled:\n", "        if False:\n"),
        "tests/method/test_averaging.py::test_pooled_variance_is_the_variance_of_all_activations_together",
    ),
    Mutant(
        "averaging",
        "chunks' means are not compared",
        "the deviation between chunks is left out of spread and pooled variance",
        code(
            f"{AVERAGING}._Moments.add",
            "self.deviation += deviation + (between if self.each else between.sum())",
            "self.deviation += deviation",
        ),
        "tests/method/test_averaging.py::test_means_and_spreads_are_the_textbook_ones_however_rows_are_split",
    ),
    Mutant(
        "averaging",
        "counts are summed",
        "num_batches_tracked of all chunks together",
        code(f"{AVERAGING}.WeightedMean.add", "torch.maximum(known, largest)", "known + largest"),
        "tests/method/test_averaging.py::test_integers_stay_integers_and_take_the_largest",
    ),
    Mutant(
        "averaging",
        "the last chunk's count",
        "num_batches_tracked is that of whoever came last, not the largest",
        code(f"{AVERAGING}.WeightedMean.add", "largest if known is None else torch.maximum(known, largest)", "largest"),
        "tests/method/test_averaging.py::test_integers_stay_integers_and_take_the_largest",
    ),
    Mutant(
        "averaging",
        "one by one, unweighted",
        "a server that adds up replies ignores their weights after the first",
        code(f"{AVERAGING}._SummedOneByOne.add", "self.total.add_(row, alpha=weight)", "self.total.add_(row)"),
        "tests/method/test_averaging.py::test_one_by_one_gives_the_same",
    ),
    Mutant(
        "averaging",
        "spread about the first client",
        "Σ p ‖x_i − x_1‖² in place of the distance from the mean",
        code(
            f"{AVERAGING}._SummedOneByOne.deviation",
            "max(0.0, self.squares - self.weight * float(torch.dot(away, away)))",
            "self.squares",
        ),
        "tests/method/test_averaging.py::test_one_by_one_gives_the_same",
    ),
    Mutant(
        "averaging",
        "train loss is unweighted",
        "train_loss is the plain mean of clients under client-weights = samples",
        code(f"{ENGINE}.begin_round", "float(job.weights @ found.losses) / total", "float(found.losses.mean())"),
        "tests/laws/test_backends.py::test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum[vmap]",
    ),
    # --- the folded model ----------------------------------------------------------------------------------
    Mutant(
        "optimizers",
        "no bias correction",
        "Adam divides by no clock",
        code(f"{OPTIMIZERS}.adam.adam", "(m / z_m) / ((v / z_v).sqrt() + by.eps)", "m / (v.sqrt() + by.eps)"),
        f"{LAWS}::test_golden_numbers",
    ),
    Mutant(
        "optimizers",
        "a clock by another β",
        "z_v goes with β₁",
        code(f"{OPTIMIZERS}.adam.adam", 'by.beta2 * states["v.clock"]', 'by.beta * states["v.clock"]'),
        f"{LAWS}::test_one_client_is_torch_optim",
    ),
    Mutant(
        "optimizers",
        "a reset leaves the clocks on",
        "m and v begin at 0 with the corrections of old ones",
        code(
            "fedmom.method.states.policies.start_reset",
            "zeros_like(mean)",
            "{n: v if '.clock/' in n else 0 * v for n, v in mean.items()}",
        ),
        f"{LAWS}::test_every_step_is_the_sign_of_a_constant_gradient",
    ),
    Mutant(
        "optimizers",
        "an exchange under Algorithm 2 resets no clock",
        "m and v begin at 0 with the corrections of old ones",
        code(
            "fedmom.method.states.policies.exchange_reset",
            "zeros_like(rows.own)",
            "{n: v if '.clock/' in n else 0 * v for n, v in rows.own.items()}",
        ),
        f"{LAWS}::test_every_step_is_the_sign_of_a_constant_gradient_under_algorithm_2",
    ),
    Mutant(
        "optimizers",
        "roots of v are averaged",
        "v̂ is the square of the mean of √v",
        both(
            code(
                f"{AVERAGING}.WeightedMean.add",
                "moments.add(value, weights, chunk)",
                "moments.add(value.sqrt() if name.startswith('v/') else value, weights, chunk)",
            ),
            code(
                f"{AVERAGING}.WeightedMean.mean",
                "in_parts({at: value.to",
                "in_parts({at: value.square() if at[1].startswith('v/') else value.to",
            ),
        ),
        f"{LAWS}::test_golden_numbers",
    ),
    Mutant(
        "optimizers",
        "v is summed",
        "v̂ is N times the mean",
        code(
            f"{AVERAGING}.WeightedMean.mean",
            "at: m.total / m.weight for",
            "at: m.total / (1 if at[1].startswith('v/') else m.weight) for",
        ),
        f"{LAWS}::test_golden_numbers",
    ),
    Mutant(
        "optimizers",
        "Lion's step by the new m",
        "the sign is of m after its own step",
        code(
            f"{OPTIMIZERS}.lion.lion",
            "(by.beta * m +",
            "(by.beta * (by.beta2 * m + (1 - by.beta2) * g) +",
        ),
        f"{LAWS}::test_golden_numbers",
    ),
    Mutant(
        "optimizers",
        "AdamW with L2",
        "λx enters m and v too",
        entry(f"{OPTIMIZERS}.table.OPTIMIZERS", "adamw", lambda right: right._replace(decoupled=False)),
        f"{LAWS}::test_one_client_is_torch_optim",
    ),
    Mutant(
        "optimizers",
        "Adagrad's old v",
        "the first step divides by ε",
        code(f"{OPTIMIZERS}.adagrad.adagrad", "g / (v.sqrt()", 'g / (states["v"].sqrt()'),
        f"{LAWS}::test_one_client_is_torch_optim",
    ),
    Mutant(
        "optimizers",
        "what a personal tensor remembers is averaged",
        "m, v and clocks are no part of algorithm.personal",
        code("fedmom.method.state.is_among", " or parameter_of(name) in parameters", ""),
        f"{STACKED}::test_a_personal_head_keeps_its_states_and_clocks",
    ),
    Mutant(
        "optimizers",
        "few passes with the first client's clocks",
        "whoever took part in other rounds is corrected as client 0",
        code(f"{OTHERS}._parts", "bool((every == every[:, :1]).all())", "True"),
        f"{STACKED}::test_every_policy_period_cohort_and_chunk",
    ),
    Mutant(
        "optimizers",
        "few passes decay by γ'λ",
        "the decay follows the clocks",
        code(f"{OTHERS}._adam", "decay * z.m / root if decoupled else decay", "decay"),
        f"{STACKED}::test_few_passes_are_the_plain_step",
    ),
    Mutant(
        "optimizers",
        "few passes with ε beside the root of v itself",
        "ε is larger in the first steps",
        code(f"{OTHERS}._adam", "method.eps * root", "method.eps"),
        f"{STACKED}::test_few_passes_are_the_plain_step",
    ),
    Mutant(
        "optimizers",
        "a first step forgets the clients' own states",
        "under local everybody begins with the common m",
        code(f"{OTHERS}.fast_first_step", "own[known][rows][some] if known in own else common[known]", "common[known]"),
        f"{STACKED}::test_every_policy_period_cohort_and_chunk",
    ),
    Mutant(
        "optimizers",
        "v is summed about the round's start",
        "in float32 its mean is rounded below 0, and has no root",
        code("fedmom.engine.stacked.means.distances", "not is_momentum(names[0])", "False"),
        f"{STACKED}::test_the_mean_of_small_v_is_none_below_zero",
    ),
    Mutant(
        "optimizers",
        "all states are compared as one",
        "a wrong v is lost beside m, which is larger",
        code(f"{AGREEMENT}._kind", 'name.partition("/")[0]', '"m"'),
        f"{STACKED}::test_a_wrong_step_is_told",
    ),
    Mutant(
        "stack",
        "the stack forgets option II",
        "from the second step on x moves by u",
        code(f"{UPDATES}.update", "nesterov=method.nesterov,", "nesterov=False,"),
        "tests/engine/test_stacked.py::test_every_model_is_the_loops[logistic-factors-True]",
    ),
    Mutant(
        "stack",
        "no weight decay in the first step",
        "the stack's first step from x̂ leaves λx out",
        code(f"{UPDATES}.first_update", "    if method.weight_decay:\n", "    if False:\n"),
        "tests/engine/test_stacked.py::test_every_model_is_the_loops[logistic-rows-False]",
    ),
    Mutant(
        "stack",
        "β = 0 keeps an old u",
        "local SGD's u, which the spread is measured of, is not g",
        code(f"{UPDATES}._update_plainly", "        torch._foreach_copy_(us, grads)\n", "        pass\n"),
        "tests/engine/test_stacked.py::test_any_number_of_steps_and_clients[2-7-0.0-rows]",
    ),
    Mutant(
        "stack",
        "chunks are added without their weights",
        "Σ w of a chunk is taken as its number of clients",
        code(f"{WENT}.add", "float(weights.sum())", "len(weights)"),
        "tests/engine/test_stacked.py::test_large_activations_and_large_tensors[batch-0-2]",
    ),
    Mutant(
        "stack",
        "spread about the start",
        "how far clients went from x̂, and not from their mean",
        code("fedmom.engine.stacked.means._round_end", " - (away / weight) * (away / weight)", ""),
        "tests/engine/test_stacked.py::test_every_model_is_the_loops[logistic-rows-False]",
    ),
    Mutant(
        "stack",
        "the padding's row is trained",
        "an Embedding's padding_idx is a word like others",
        code(f"{FOLDED}.embeddings.FoldedEmbedding.rows", "if self.padding is None:", "if True:"),
        "tests/engine/test_transformers.py::test_every_path_is_plain_torch[encoder]",
    ),
    Mutant(
        "stack",
        "a frozen base of the stack's own",
        "the folded model has a copy of what is not trained",
        code(f"{FOLDED}.fold.fold", "{id(p): p for p in model.parameters() if not p.requires_grad}", "{}"),
        "tests/engine/test_transformers.py::test_what_is_frozen_has_no_copy_per_client",
    ),
    Mutant(
        "stack",
        "torch's fused evaluation passes adapters by",
        "a TransformerEncoderLayer with adapters is judged without them",
        code(f"{ADAPTERS}.lora", "module.activation_relu_or_gelu = 0", "pass"),
        "tests/tasks/test_adapters.py::test_adapters_change_nothing_at_first_and_are_all_that_is_trained",
    ),
    Mutant(
        "replays",
        "a replay of the round that was recorded",
        "minibatches, γ and weights are not sent again",
        code(
            f"{RECORDING}.replay_by",
            "        there.copy_(sendable(words, there.device), non_blocking=True)\n",
            "",
        ),
        "tests/engine/test_cuda_graphs.py::test_replayed_rounds_are_the_stacks[mlp-factors-average]",
    ),
    Mutant(
        "replays",
        "steps that are as long once more",
        "of networks whose steps are chaotic nothing is replayed",
        code(f"{AGREEMENT}.short", "lr * _SHORT / len(lrs)", "lr"),
        "tests/engine/test_noise.py::test_steps_that_differ_from_themselves_are_replayed",
    ),
    Mutant(
        "replays",
        "noise as large as it may be",
        "a replay of steps that are noise alone is taken for right",
        constant(f"{AGREEMENT}._FAR", lambda far: 1e9),
        "tests/engine/test_noise.py::test_of_steps_that_are_noise_alone_nothing_is_replayed",
    ),
    Mutant(
        "replays",
        "minibatches of the round that was expected",
        "what was drawn ahead is taken for whatever round comes",
        code(f"{REPLAYS}._orders", "if _alike(known, job):", "if True:"),
        "tests/engine/test_cuda_graphs.py::test_minibatches_are_drawn_ahead_for_the_round_that_follows_and_no_other",
    ),
    Mutant(
        "replays",
        "the round that is begun ahead starts where this one did",
        "one round is trained over and over",
        code(f"{LOOP}.run_rounds", "engine, new, known)", "engine, done, known)"),
        "tests/engine/test_cuda_graphs.py::test_replayed_rounds_are_the_stacks[mlp-factors-average]",
    ),
    Mutant(
        "replays",
        "a card looks at x alone",
        "u and the buffers may be NaN",
        code(f"{WENT}._looks", '"momentum": means[half:]', '"momentum": means[:half]'),
        "tests/engine/test_cuda_graphs.py::test_a_card_says_which_part_is_not_finite",
    ),
    Mutant(
        "stack",
        "clients come back in the order of their steps",
        "with unequal numbers of steps, rows of others",
        code(f"{STACK}.run", "ended if same else _in_order(ended, torch.argsort(order))", "ended"),
        "tests/engine/test_stacked.py::test_unequal_numbers_of_steps[64-rows]",
    ),
    Mutant(
        "stack",
        "the lr of the round's first step in all of it",
        "a schedule that changes within a round is not followed",
        code(f"{STACK}._all_steps", "lrs[s], first", "lrs[0], first"),
        "tests/engine/test_stacked.py::test_a_changing_lr_enters_the_numbers[rows]",
    ),
    # --- batches -------------------------------------------------------------------------------------------
    Mutant(
        "batches",
        "the same minibatch each step",
        "every step of a round reads the first B positions",
        code(
            f"{BATCHES}.Sampler.draw",
            "first_steps[:, None] * self.batch_size + place",
            "first_steps[:, None] * self.batch_size + place % self.batch_size",
        ),
        "tests/data/test_batches.py::test_batches_do_not_depend_on_company_order_or_rounds",
    ),
    Mutant(
        "batches",
        "all clients shuffle alike",
        "the order of a client's examples does not depend on the client",
        code(
            f"{BATCHES}.Sampler._shuffled",
            "random_bits(SHUFFLE, self.seed, clients[rows][segment],",
            "random_bits(SHUFFLE, self.seed, 0 * segment,",
        ),
        "tests/data/test_batches.py::test_seeds_and_clients_differ",
    ),
    Mutant(
        "batches",
        "clients shuffle by their place",
        "the order of a client's examples depends on who is asked with it",
        code(f"{BATCHES}.Sampler._shuffled", "clients[rows][segment]", "rows[segment]"),
        "tests/data/test_batches.py::test_batches_do_not_depend_on_company_order_or_rounds",
    ),
    Mutant(
        "batches",
        "the shuffle ignores the seed",
        "every seed has the same order",
        code(f"{BATCHES}.Sampler._shuffled", "random_bits(SHUFFLE, self.seed,", "random_bits(SHUFFLE, 0,"),
        "tests/data/test_batches.py::test_seeds_and_clients_differ",
    ),
    Mutant(
        "batches",
        "the same order in every pass",
        "a client's examples are shuffled once for all",
        code(f"{BATCHES}.Sampler._shuffled", "which_pass[segment]", "0 * which_pass[segment]"),
        "tests/data/test_batches.py::test_shuffle_gives_every_example_once_per_pass",
    ),
    Mutant(
        "batches",
        "drop-last",
        "what does not fill a batch is never seen",
        code(
            f"{BATCHES}.Sampler._shuffled",
            "sizes = self.sizes[clients]",
            "sizes = torch.where(self.sizes[clients] >= self.batch_size, "
            "self.sizes[clients] // self.batch_size * self.batch_size, self.sizes[clients])",
        ),
        "tests/data/test_batches.py::test_shuffle_gives_every_example_once_per_pass",
    ),
    Mutant(
        "batches",
        "examples of others",
        "a client's numbers are looked up from the first client's on",
        code(f"{BATCHES}.Sampler.draw", "self.offsets[clients][:, None] + own", "own"),
        "tests/data/test_batches.py::test_clients_draw_from_their_own_examples",
    ),
    Mutant(
        "batches",
        "augmentation of the wrong client",
        "crops go by the place in the stack, so another chunk size moves images otherwise",
        code(f"{BATCHES}.moves", "address = (seed, clients[..., None],", "address = (seed, 0 * clients[..., None],"),
        "tests/data/test_batches.py::test_crop_flip_is_pad_crop_flip",
    ),
    Mutant(
        "batches",
        "augmentation once for all steps",
        "a client's crops are the same in every step",
        code(f"{BATCHES}.moves", "steps[..., None], torch", "0 * steps[..., None], torch"),
        "tests/data/test_batches.py::test_crop_flip_is_pad_crop_flip",
    ),
    Mutant(
        "batches",
        "images are not centred by the deviation",
        "x/(255 std) − mean",
        code(f"{BATCHES}._constants", "(shift / scale).to(dtype)", "shift.to(dtype)"),
        "tests/data/test_batches.py::test_normalised",
    ),
    Mutant(
        "batches",
        "one dropout mask for the whole round",
        "the key is that of the round's first step",
        code(
            f"{TASK}.draws",
            "random_bits(DROPOUT, self.seed, who, steps)",
            "random_bits(DROPOUT, self.seed, who, steps[:, :1].expand(who.shape))",
        ),
        "tests/tasks/test_supervised.py::test_every_step_of_every_client_drops_out_otherwise",
    ),
    Mutant(
        "batches",
        "evaluation drops out",
        "the model is judged as in training",
        code(
            "fedmom.tasks.evaluation.Evaluation._outputs", "            model.eval()\n", "            model.train()\n"
        ),
        "tests/tasks/test_supervised.py::test_evaluation_is_the_models_own_in_eval_mode[cnn]",
    ),
    # --- partitions ----------------------------------------------------------------------------------------
    Mutant(
        "partitions",
        "an example held twice",
        "the last client holds the first one's first example in place of its own last",
        code(
            f"{PARTITION}.make_partition",
            'return Partition(np.argsort(owner, kind="stable"),',
            'indices = np.argsort(owner, kind="stable")\n    indices[-1] = indices[0]\n    return Partition(indices,',
        ),
        "tests/data/test_partition.py::test_every_example_has_one_client_and_the_seed_says_which",
    ),
    Mutant(
        "partitions",
        "a lost example",
        "the last client's last example is nobody's",
        code(
            f"{PARTITION}.make_partition",
            "np.concatenate([[0], np.cumsum(sizes)])",
            "np.concatenate([[0], np.cumsum(sizes)]) - (np.arange(num_clients + 1) == num_clients)",
        ),
        "tests/data/test_partition.py::test_every_example_has_one_client_and_the_seed_says_which",
    ),
    Mutant(
        "partitions",
        "the seed is ignored",
        "every seed has the same partition",
        code(
            f"{PARTITION}.make_partition",
            "default_rng([seed, crc32(name.encode())])",
            "default_rng([0, crc32(name.encode())])",
        ),
        "tests/data/test_partition.py::test_another_seed_is_another_partition",
    ),
    Mutant(
        "partitions",
        "alpha is ignored",
        "dirichlet-client draws by Dir(p)",
        code(f"{PARTITION}.dirichlet_client", "request.alpha * (", "("),
        "tests/data/test_partition.py::test_dirichlet_client_draws_from_its_law",
    ),
    Mutant(
        "partitions",
        "alpha of another law",
        "dirichlet-client draws by Dir(α) per class in place of Dir(αp)",
        code(
            f"{PARTITION}.dirichlet_client",
            "request.alpha * (request.class_sizes / len(request.classes))",
            "np.full(num_classes, request.alpha)",
        ),
        "tests/data/test_partition.py::test_dirichlet_client_draws_from_its_law",
    ),
    Mutant(
        "partitions",
        "min-size is ignored by dirichlet-class",
        "a draw that leaves a client with fewer is taken",
        code(f"{PARTITION}.dirichlet_class", "counts.sum(axis=1).min() >= request.min_size", "True"),
        "tests/data/test_partition.py::test_bad_input_is_one_line_that_names_the_key",
    ),
    Mutant(
        "partitions",
        "min-size is ignored by quantity",
        "the smallest clients get what their weight gives them",
        code(
            f"{PARTITION}.quantity",
            "len(request.classes), request.num_clients, request.min_size",
            "len(request.classes), request.num_clients, 0",
        ),
        "tests/data/test_partition.py::test_min_size_holds_for_every_rule",
    ),
    Mutant(
        "partitions",
        "shards of unsorted labels",
        "a client's shards hold all classes",
        code(f"{PARTITION}.shards", 'np.argsort(request.classes, kind="stable")', "np.arange(len(request.classes))"),
        "tests/data/test_partition.py::test_shards_hold_few_classes[1]",
    ),
    Mutant(
        "partitions",
        "sizes ignore sigma",
        "quantity's log-normal law always has σ = 1",
        entry(
            f"{PARTITION}.QUANTITY_LAWS",
            "log-normal",
            lambda _: lambda request: request.rng.standard_normal(request.num_clients),
        ),
        "tests/data/test_partition.py::test_log_normal_sizes_have_the_spread_asked_for[0.0]",
    ),
    Mutant(
        "partitions",
        "the remainder goes to the last client",
        "n mod N examples more than the others have",
        code(
            "fedmom.data.drawing.equal_sizes",
            "(np.arange(num_parts) < total % num_parts)",
            "(np.arange(num_parts) == num_parts - 1) * (total % num_parts)",
        ),
        "tests/data/test_partition.py::test_every_example_has_one_client_and_the_seed_says_which",
    ),
    Mutant(
        "partitions",
        "balanced sizes at the cost of the classes",
        "columns are not settled, so classes add up to something else",
        code(
            f"{PARTITION}.dirichlet_balanced",
            "    settle_columns(counts, sizes[:, None] * shares, request.class_sizes)\n",
            "",
        ),
        "tests/data/test_partition.py::test_balanced_counts_keep_both_margins",
    ),
    # --- schedules -----------------------------------------------------------------------------------------
    Mutant(
        "schedules",
        "decay one step late",
        "the step that begins on a milestone still has the old lr",
        code(
            f"{SCHEDULES}.step_decay",
            "step >= horizon.steps(m, rate.unit) * (1 - 1e-9)",
            "step > horizon.steps(m, rate.unit)",
        ),
        "tests/method/test_schedules.py::test_decay_begins_with_the_first_step_past_the_milestone",
    ),
    Mutant(
        "schedules",
        "an ulp late",
        "a milestone on a step is missed where the division is uneven",
        code(f"{SCHEDULES}.step_decay", " * (1 - 1e-9)", ""),
        "tests/method/test_schedules.py::test_a_milestone_on_a_step_is_met_there_though_the_division_is_uneven",
    ),
    Mutant(
        "schedules",
        "the schedule restarts every round",
        "γ is that of step 0, 1, … in each round",
        code(f"{PLAN}.clients_job", "first = round_index * per_round", "first = 0.0 * per_round"),
        "tests/laws/test_method.py::test_one_client_is_torch_sgd",
    ),
    Mutant(
        "schedules",
        "the schedule is one step ahead",
        "step t takes γ of step t + 1",
        code(f"{PLAN}.clients_job", "math.floor(first + s)", "math.floor(first + s) + 1"),
        "tests/laws/test_method.py::test_one_client_is_torch_sgd",
    ),
    Mutant(
        "schedules",
        "γ changes between rounds alone",
        "all steps of a round take that of its first",
        code(f"{PLAN}.clients_job", "math.floor(first + s)", "math.floor(first)"),
        "tests/engine/test_engine.py::test_a_round_goes_on_where_the_one_before_ended",
    ),
    Mutant(
        "schedules",
        "the cosine ends a step early",
        "half a period ends at T − 1",
        code(f"{SCHEDULES}.cosine", "max(1.0, horizon.num_steps - warmup)", "max(1.0, horizon.num_steps - 1 - warmup)"),
        "tests/method/test_schedules.py::test_cosine_goes_from_lr_to_the_minimum_and_never_up",
    ),
    Mutant(
        "schedules",
        "the cosine ignores the warm-up",
        "it has come down by the end of the warm-up",
        code(
            f"{SCHEDULES}.cosine",
            "max(0.0, step - warmup) / max(1.0, horizon.num_steps - warmup)",
            "step / horizon.num_steps",
        ),
        "tests/method/test_schedules.py::test_cosine_after_a_warm_up_starts_from_lr_at_its_end",
    ),
    Mutant(
        "schedules",
        "warm-up begins at zero",
        "step 0 does not move x",
        code(f"{SCHEDULES}.LearningRate.at", "(step + 1) / warmup", "step / warmup"),
        "tests/method/test_schedules.py::test_cosine_after_a_warm_up_starts_from_lr_at_its_end",
    ),
    Mutant(
        "schedules",
        "joint epochs are one client's",
        "milestones count passes of one client over all data",
        code(
            f"{PLAN}.Plan.horizon",
            "float(sizes.sum()) / (self.cohort_size * self.batch_size)",
            "float(sizes.sum()) / self.batch_size",
        ),
        "tests/engine/test_engine.py::test_a_round_goes_on_where_the_one_before_ended",
    ),
    Mutant(
        "schedules",
        "the run's length is its rounds",
        "fractions of the run are of R and not of T = R · I steps",
        code(f"{PLAN}.Plan.horizon", "math.ceil(self.num_rounds * per_round)", "self.num_rounds"),
        "tests/engine/test_engine.py::test_a_round_goes_on_where_the_one_before_ended",
    ),
    Mutant(
        "schedules",
        "theory's N is all clients",
        "with partial participation N is not the cohort's size",
        code(f"{PLAN}.Plan.horizon", "Horizon(total, self.cohort_size,", "Horizon(total, len(sizes),"),
        "tests/engine/test_engine.py::test_a_round_goes_on_where_the_one_before_ended",
    ),
    # --- the round loop and its records --------------------------------------------------------------------
    Mutant(
        "rounds",
        "the same minibatches each round",
        "a round begins with the client's first examples again",
        code(f"{PLAN}.clients_job", "first_steps = round_index * steps", "first_steps = 0 * steps"),
        "tests/engine/test_engine.py::test_a_round_goes_on_where_the_one_before_ended",
    ),
    Mutant(
        "rounds",
        "bytes are those of float32",
        "every number counts four bytes",
        code("fedmom.travel.feedback.bytes_of", "value.numel() * value.element_size()", "value.numel() * 4"),
        "tests/engine/test_engine.py::test_bytes_sent_counts_what_travels",
    ),
    Mutant(
        "rounds",
        "the cohort's mean message counts as everybody's",
        "a correction's server divides by the cohort's size where it must divide by N",
        code(f"{LOOP}.after_round", "/ float(weights.sum())", "/ float(job.weights.sum())"),
        "tests/laws/test_memory.py::test_who_was_never_drawn_has_the_state_of_the_start_and_others_keep_theirs",
    ),
    Mutant(
        "rounds",
        "a correction's states go to their places in the cohort",
        "a client takes over what another one remembers",
        code(f"{PLAN}.round_job", "{n: v[job.clients]", "{n: v[: len(job.clients)]"),
        "tests/laws/test_memory.py::test_rounds_with_scaffold_are_the_naive_loops[vmap]",
    ),
    Mutant(
        "rounds",
        "a correction's message travels for nothing",
        "bytes_sent leaves it out",
        code(f"{LOOP}.after_round", "correction=outcome.mean.correction", "correction={}"),
        "tests/laws/test_memory.py::test_who_was_never_drawn_has_the_state_of_the_start_and_others_keep_theirs",
    ),
    Mutant(
        "rounds",
        "the last step's lr for their sum",
        "a correction divides a displacement by γ of one step",
        code(f"{CORRECTIONS}.finish_round", "lrs.cumsum(0)[num_steps - 1]", "(num_steps * lrs[num_steps - 1])"),
        "tests/laws/test_memory.py::test_a_client_is_told_the_sum_of_its_own_learning_rates",
    ),
    Mutant(
        "rounds",
        "a correction's state is the one before the steps",
        "what a client remembers in its steps is lost",
        code(f"{STEP}.local_step", "state._replace(correction=own)", "state"),
        "tests/laws/test_memory.py::test_scaffold_on_the_golden_run_is_exact_on_every_path_in_both_dtypes",
    ),
    Mutant(
        "rounds",
        "buffers travel for nothing",
        "bytes_sent leaves BatchNorm's statistics out",
        code(
            f"{PLAN}._bytes",
            '("params", "momentum", "buffers")',
            '("params", "momentum")',
        ),
        "tests/engine/test_engine.py::test_bytes_of_an_exchange_by_hand",
    ),
    Mutant(
        "rounds",
        "u travels under β = 0",
        "bytes_sent counts momentum that nobody needs",
        code(f"{STATES}.rules.Rules.sends", "and self.empty:", "and False:"),
        "tests/engine/test_engine.py::test_bytes_sent_counts_what_travels",
    ),
    Mutant(
        "rounds",
        "evaluation before the round",
        "test_loss of round r is that of round r − 1",
        code(
            f"{LOOP}.run_rounds",
            "new, measured = _judged(problem, plan, engine, job, outcome, new)",
            "_, measured = _judged(problem, plan, engine, job, outcome, new._replace(state=done.state))",
        ),
        "tests/engine/test_engine.py::test_records_say_what_they_should",
    ),
    Mutant(
        "rounds",
        "the last round is not evaluated",
        "a run of 7 rounds with eval-every = 5 ends without a measure",
        code(f"{PLAN}.Plan.evaluates", " or round_number == self.num_rounds", ""),
        "tests/engine/test_engine.py::test_records_say_what_they_should",
    ),
    Mutant(
        "rounds",
        "joint epochs are a client's epochs",
        "examples over N, and not over the number of examples",
        code(f"{LOOP}._record", "new.examples / int(problem.sizes.sum())", "new.examples / len(problem.sizes)"),
        "tests/laws/test_backends.py::test_clients_take_as_many_steps_as_their_epochs_have[loop]",
    ),
    Mutant(
        "rounds",
        "examples of a cohort are everybody's",
        "joint epochs count clients that sat the round out",
        code(
            f"{LOOP}.after_round",
            "int(job.num_steps.sum()) * plan.batch_size",
            "int(job.num_steps[0]) * len(problem.sizes) * plan.batch_size",
        ),
        "tests/laws/test_backends.py::test_a_cohort_alone_trains_is_weighed_and_keeps_its_momentum[loop]",
    ),
    Mutant(
        "rounds",
        "the lr of the round's last step",
        "a record says γ of the end of the round",
        code(f"{LOOP}._record", '"lr": job.lrs[0],', '"lr": job.lrs[-1],'),
        "tests/engine/test_engine.py::test_a_round_goes_on_where_the_one_before_ended",
    ),
    Mutant(
        "rounds",
        "a NaN in the momentum passes",
        "x and the measures alone are looked at",
        code(
            f"{LOOP}._check_finite", "in outcome.mean._asdict().items() if", 'in [("params", outcome.mean.params)] if'
        ),
        "tests/engine/test_engine.py::test_a_number_that_is_not_finite_ends_the_run_wherever_it_is",
    ),
    Mutant(
        "rounds",
        "the worst client is the best",
        "worst_client_accuracy is the largest",
        code("fedmom.rounds.evaluation.summarised", "(min if rises(name) else max)", "(max if rises(name) else max)"),
        "tests/engine/test_gossip.py::test_clients_own_models_are_measured",
    ),
    Mutant(
        "rounds",
        "the first clients are measured",
        "eval-clients are not spread over all",
        code("fedmom.rounds.evaluation.chosen_clients", "place * num_clients // count", "place"),
        "tests/engine/test_gossip.py::test_clients_own_models_are_measured",
    ),
    Mutant(
        "failures",
        "who failed is not said",
        "a record of a round without somebody has no num_failed",
        code(f"{LOOP}.run_rounds", "if len(job.clients) < asked:", "if False:"),
        "tests/flower/test_flower.py::test_proceed_averages_the_others_and_says_so",
    ),
    # --- resume --------------------------------------------------------------------------------------------
    Mutant(
        "resume",
        "momentum is lost",
        "a resumed run starts from u = 0",
        code(
            f"{FOLDER}.load",
            "            state=state,\n",
            "            state=state._replace(momentum=template.state.momentum),\n",
        ),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "buffers are lost",
        "a resumed run starts with BatchNorm's first statistics",
        code(
            f"{FOLDER}.load",
            "            state=state,\n",
            "            state=state._replace(buffers=template.state.buffers),\n",
        ),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "counters are lost",
        "steps, examples and bytes count from the resume on",
        code(f"{FOLDER}.load", "**{name: about[name] for name in _COUNTS}", 'round=about["round"]'),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "clients' momenta are lost",
        "under `local` every client starts from u = 0",
        code(
            f"{FOLDER}.load",
            "own=own._replace(correction={}) if template.own is not None else None",
            "own=template.own",
        ),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "clients' rows are lost",
        "under Algorithm 2 every client starts from x⁰",
        code(f"{FOLDER}.load", "rows=own if template.rows is not None else None", "rows=template.rows"),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "slow momentum is lost",
        "SlowMo's u_s starts from 0",
        code("fedmom.records.folder._memories", '{"outer": outer,', '{"outer": template.outer,'),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "rows of another round",
        "after a kill between two files the clients' rows need not be the checkpoint's",
        code(f"{FOLDER}._load_rows", "c.exists() and read_about(c) == about", "c.exists()"),
        "tests/runs/test_resume.py::test_kill_between_the_two_files_of_a_checkpoint",
    ),
    Mutant(
        "resume",
        "the older rows are not kept",
        "a kill between two files leaves a checkpoint without its rows",
        code(f"{FOLDER}.save", "                os.replace(clients, previous)\n", "                pass\n"),
        "tests/runs/test_resume.py::test_kill_between_the_two_files_of_a_checkpoint",
    ),
    Mutant(
        "resume",
        "in a file's order",
        "tensors come back in safetensors' order, and sums over them differ in the last digit",
        code(
            f"{FOLDER}.load",
            "{name: tensors[name] for name in flatten(template.state)}",
            "{name: tensors[name] for name in sorted(flatten(template.state), reverse=True)}",
        ),
        "tests/records/test_folder.py::test_what_was_saved_is_loaded",
    ),
    Mutant(
        "resume",
        "an interrupted run saves nothing",
        "rounds since the last checkpoint are lost",
        code(
            f"{RUN}._to_the_end",
            "        if saved != done.round:\n            self._save(done)\n        if self.folder and",
            "        if self.folder and",
        ),
        "tests/runs/test_resume.py::test_interrupted_run_resumes_to_the_same_bytes",
    ),
    Mutant(
        "resume",
        "time begins anew",
        "wall_seconds counts from the resume on",
        code(f"{RUN}._begin", "            if self.rounds.last:\n", "            if False:\n"),
        "tests/runs/test_resume.py::test_interrupted_run_resumes_to_the_same_bytes",
    ),
    Mutant(
        "resume",
        "damage passes",
        "a checkpoint whose bits have changed is taken",
        code(f"{FILES}._read", "checked[1] != _checksum(found, text)", "False"),
        "tests/records/test_history.py::test_one_flipped_bit_anywhere_is_refused_in_one_line",
    ),
    Mutant(
        "resume",
        "two processes in one folder",
        "the lock is not taken",
        code(f"{FOLDER}._acquire", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        "tests/runs/test_resume.py::test_two_processes_cannot_share_a_folder_and_a_killed_run_resumes_to_the_same_bytes",
    ),
    # --- failures of clients -------------------------------------------------------------------------------
    Mutant(
        "failures",
        "the absent client's weight stays in the mean",
        "`proceed` averages the round's start in its place",
        code(
            f"{PRSGDM}._average",
            "        self.fleet.enough(server_round, num_clients)\n",
            "        self.fleet.enough(server_round, num_clients)\n"
            "        for _ in range(self.fleet.num_clients - num_clients):\n"
            "            mean.add_one(unflatten(self._expected), 1.0)\n",
        ),
        "tests/flower/test_flower.py::test_proceed_averages_the_others_and_says_so",
    ),
    Mutant(
        "failures",
        "an answer counts once for every try",
        "`retry` averages a client twice",
        code(
            f"{CLIENTS}.exchange",
            "for one in done if one.answer is not None)",
            "for one in done if one.answer is not None for _ in range(one.tries))",
        ),
        "tests/flower/test_failures.py::test_the_late_answer_to_an_earlier_try_counts",
    ),
    Mutant(
        "failures",
        "stop goes on",
        "on-failure = stop does as proceed",
        both(
            code(f"{CLIENTS}._again", 'if self.on_failure == "proceed":', 'if self.on_failure != "retry":'),
            code(f"{CLIENTS}._without", 'if self.on_failure != "proceed":', "if False:"),
        ),
        "tests/flower/test_failures.py::test_a_missing_reply_stops_a_round_that_somebody_else_collected",
    ),
    Mutant(
        "failures",
        "one try too few",
        "server.retries = 2 asks again once",
        code(f"{CLIENTS}._again", "failed.tries > self.retries", "failed.tries >= self.retries"),
        "tests/flower/test_flower.py::test_retry_gives_the_whole_result",
    ),
    Mutant(
        "failures",
        "the fewest clients are ignored",
        "a round of too few goes on",
        code(f"{CLIENTS}.enough", "if answered < self.min_clients:", "if not answered:"),
        "tests/flower/test_failures.py::test_proceed_goes_on_without_it",
    ),
    Mutant(
        "failures",
        "NaN is averaged",
        "an update that is not finite is taken",
        code("strategies.replies._check", "if not (value.sum()", "if False and not (value.sum()"),
        "tests/flower/test_failures.py::test_a_refused_update_is_named_there_too",
    ),
    Mutant(
        "failures",
        "an answer for others is taken",
        "a node's reply is averaged in another client's place",
        code("strategies.replies._about", "if clients and about[", "if False and about["),
        "tests/flower/test_failures.py::test_a_wrong_block_is_refused_by_name",
    ),
    Mutant(
        "failures",
        "an answer that comes twice is averaged twice",
        "a node that is not asked (any more) is listened to",
        code(f"{CLIENTS}.answered", "if asked is not None and node_id not in missing:", "if False:"),
        "tests/flower/test_failures.py::test_an_answer_that_comes_twice_is_not_averaged_twice",
    ),
    Mutant(
        "failures",
        "nodes in the order of their ids",
        "sums are not taken in client order, so they differ from the engine's",
        code(
            "strategies.fleet.learn_holders", "key=lambda holder: holder.clients", "key=lambda holder: holder.node_id"
        ),
        "tests/flower/test_failures.py::test_a_node_that_does_not_answer_the_query_is_asked_again",
    ),
    Mutant(
        "failures",
        "a client's row goes to its place",
        "under `local` the server keeps u of the k-th of a reply as client k's",
        code(f"{PRSGDM}._average", "self.own[client] = {name", "self.own[place] = {name"),
        "tests/flower/test_failures.py::test_local_by_itself_keeps_every_clients_momentum",
    ),
    Mutant(
        "failures",
        "clients' momenta in the nodes' order",
        "under `local` a node that holds every other client mixes them up",
        code(
            "strategies.backends._outcome",
            "torch.cat([tree[name] for tree in found])[order]",
            "torch.cat([tree[name] for tree in found])",
        ),
        "tests/flower/test_failures.py::test_rows_go_to_their_clients_in_whatever_order_nodes_hold_them",
    ),
    Mutant(
        "failures",
        "the relay moves who was not there",
        "what a policy makes of u is also made of an absent client's",
        code(
            f"{DSGDM}._mix", "                    value[absent] = before[name][absent]\n", "                    pass\n"
        ),
        "tests/flower/test_relay.py::test_proceed_lets_a_client_stand_still",
    ),
    Mutant(
        "failures",
        "the relay mixes with an absent client",
        "its stale row enters its neighbours' means",
        code(
            f"{DSGDM}._mix",
            "            mixing = mixing.without(_links_of(mixing, set(absent.tolist())))\n",
            "            pass\n",
        ),
        "tests/flower/test_failures.py::test_the_relays_bookkeeping_is_of_this_round",
    ),
    Mutant(
        "failures",
        "the relay's answers of the round before",
        "who answered then passes for answered now",
        code(f"{DSGDM}.train_round", "        self._updates = {}\n", ""),
        "tests/flower/test_failures.py::test_a_node_that_comes_back_under_another_id_is_the_same_node",
    ),
    Mutant(
        "failures",
        "the Flower server's slow step takes its own lr",
        "SlowMo divides by the strategy's lr where clients say theirs",
        code(f"{PRSGDM}._outer_step", 'trained.metrics.get("lr", self.lr)', "self.lr"),
        "tests/flower/test_flower.py::test_slow_momentum_divides_by_the_clients_lr",
    ),
    Mutant(
        "failures",
        "the Flower server's outer step is `start`'s alone",
        "within a wrapper of Flower's everybody goes on from the mean",
        code(f"{PRSGDM}.aggregate_train", "self._outer_step(trained)", "trained.state"),
        "tests/flower/test_strategies_alone.py::test_the_outer_step_is_taken_once_whoever_drives_the_rounds",
    ),
    Mutant(
        "failures",
        "a second run goes on from the first one's rows",
        "under `local` a strategy that starts again has the u of the run before",
        code(f"{PRSGDM}._begin", "self._given if self.own is self._kept else self.own", "self.own"),
        "tests/flower/test_strategies_alone.py::test_a_second_start_begins_anew",
    ),
    Mutant(
        "failures",
        "a negative v is averaged",
        "a mean of squares that no client can have makes NaN of everybody's x",
        code("strategies.replies._bounds", 'state_of(tensor) == "v"', "False"),
        "tests/flower/test_replies.py::test_a_wrong_reply_is_its_clients_failure_and_the_round_goes_on",
    ),
    Mutant(
        "failures",
        "who tells no loss has a loss of 0",
        "a metric's mean is divided by the weight of those who do not tell it too",
        code("strategies.replies.mean_metrics", "value / weights[name]", "value / total"),
        "tests/flower/test_replies.py::test_a_metrics_mean_is_of_those_who_tell_it",
    ),
    # --- identity ------------------------------------------------------------------------------------------
    Mutant(
        "identity",
        "the seed is a place",
        "a run goes on with another seed",
        constant(f"{IDENTITY}.PLACE", lambda names: (*names, "run.seed")),
        "tests/records/test_identity.py::test_a_runs_identity_is_every_key_but_its_length_and_place",
    ),
    Mutant(
        "identity",
        "content is not compared",
        "a run goes on with other data, code or W",
        code(f"{IDENTITY}.Identity.agreed", "contents.get(key, now) != now", "False"),
        CONTENT,
    ),
    Mutant(
        "identity",
        "labels are no content",
        "a run goes on with other labels",
        code(f"{IDENTITY}._tensors_of", '("x_train", "y_train", "x_test", "y_test")', '("x_train", "x_test")'),
        CONTENT,
    ),
    Mutant(
        "identity",
        "code is a function's own lines",
        "what it calls may change",
        code(f"{IDENTITY}._Reached._named", '            self._later("", {where: value})\n', "            pass\n"),
        CONTENT,
    ),
    Mutant(
        "identity",
        "a new key makes old runs others",
        "keys at their defaults take part",
        code(f"{IDENTITY}.identity_of", "if value != KEYS[key].default}", "}"),
        "tests/records/test_identity.py::test_a_key_that_did_not_exist_then_does_not_hinder_a_resume",
    ),
    Mutant(
        "identity",
        "formula 1 takes new keys",
        "runs of older versions are refused",
        code(f"{IDENTITY}._names_of_1", 'return {f"{section}.{name}"', 'return set(KEYS) | {f"{section}.{name}"'),
        "tests/records/test_identity.py::test_a_key_that_did_not_exist_then_does_not_hinder_a_resume",
    ),
    # --- history -------------------------------------------------------------------------------------------
    Mutant(
        "history",
        "rounds.jsonl is not cut back",
        "lines after the checkpoint stay, and come again",
        code(f"{HISTORY}.cut_back", "                continue\n", "                pass\n"),
        "tests/records/test_history.py::test_rounds_are_a_sequence_wherever_they_are",
    ),
    Mutant(
        "history",
        "the short run's last evaluation stays",
        "a longer run has a measure that the long run at once has not",
        code(f"{HISTORY}.cut_back", "number == round_number and lost", "False"),
        "tests/runs/test_resume.py::test_longer_run_is_evaluated_where_the_long_run_is",
    ),
    Mutant(
        "history",
        "missing rounds pass",
        "a file that lacks lines before the checkpoint is gone on with",
        code(f"{HISTORY}.cut_back", "if len(kept) != round_number:", "if False:"),
        "tests/records/test_history.py::test_what_is_missing_or_broken_before_the_end_is_named",
    ),
    Mutant(
        "history",
        "a broken line in the middle passes",
        "what comes after it is left out without a word",
        code(
            f"{HISTORY}.iterate_rounds",
            "            if broken:\n                break\n",
            "            if broken:\n                return\n",
        ),
        "tests/records/test_history.py::test_what_is_missing_or_broken_before_the_end_is_named",
    ),
    Mutant(
        "history",
        "a half line is an error",
        "what a kill cut short stops a resume",
        code(
            f"{HISTORY}.iterate_rounds",
            "            return  # if there was one, it was the last line",
            "            pass",
        ),
        "tests/records/test_history.py::test_what_is_missing_or_broken_before_the_end_is_named",
    ),
    Mutant(
        "history",
        "places of lines go stale",
        "a record asked for after another was added is found where it was",
        code(f"{HISTORY}.History.append", "self.last, self._starts = record, None", "self.last = record"),
        "tests/records/test_history.py::test_records_that_were_added_are_read_back",
    ),
    Mutant(
        "history",
        "one record too many is forgotten",
        "at the very length from which a run is read from its folder",
        code(f"{HISTORY}.History.append", "self._count <= MOST_KEPT", "self._count < MOST_KEPT"),
        "tests/records/test_history.py::test_records_that_were_added_are_read_back",
    ),
    Mutant(
        "history",
        "thinning loses the best round",
        "a long run's curve has not the accuracy that its table names",
        code(f"{HISTORY}.thinned", "        kept[best[1]] = best[2]\n", "        pass\n"),
        "tests/records/test_history.py::test_thinning_keeps_the_best_round_and_the_ends",
    ),
    # --- records -------------------------------------------------------------------------------------------
    Mutant(
        "records",
        "how a run ended is not written",
        "status.json says running for ever",
        code(f"{STATUS}.Heart.end", "            self._write(status, reason, last=True)\n", "            pass\n"),
        "tests/records/test_status.py::test_every_end_is_written",
    ),
    Mutant(
        "records",
        "an interrupted run is a failed one",
        "Ctrl-C and an error are one status",
        code(
            f"{RUN}._to_the_end",
            'status, message = "interrupted", f"interrupted after',
            'status, message = "failed", f"interrupted after',
        ),
        "tests/records/test_status.py::test_every_end_is_written",
    ),
    Mutant(
        "records",
        "a reused process id is the run's",
        "a killed run passes for running where its id was given again",
        code(f"{STATUS}._is_alive", "return now == born", "return True"),
        "tests/records/test_status.py::test_a_process_that_is_gone_was_killed",
    ),
    Mutant(
        "records",
        "a silent run elsewhere is running",
        "a run on another machine is never given up",
        code(f"{STATUS}._looked_for", "    if silent > SILENT_SECONDS:\n        when", "    if False:\n        when"),
        "tests/records/test_status.py::test_a_run_elsewhere_is_known_by_when_it_was_last_heard_of",
    ),
    # --- every client --------------------------------------------------------------------------------------
    Mutant(
        "every client",
        "the share is what a client trains on",
        "it holds out 1 − share of its examples",
        code(f"{HELD_OUT}.held_out_sizes", "np.floor(share * sizes + 0.5)", "np.floor((1 - share) * sizes + 0.5)"),
        HOLDS_OUT,
    ),
    Mutant(
        "every client",
        "a client's share is rounded down",
        "⌊share·n⌋ examples are held out",
        code(f"{HELD_OUT}.held_out_sizes", "share * sizes + 0.5", "share * sizes"),
        HOLDS_OUT,
    ),
    Mutant(
        "every client",
        "the same examples are held out for every seed",
        "the draw goes by client and place alone",
        code(f"{HELD_OUT}.held_out", "random_bits(HELD_OUT, seed,", "random_bits(HELD_OUT, 0,"),
        HOLDS_OUT,
    ),
    Mutant(
        "every client",
        "clients hold out by their place in a list",
        "a node that knows itself alone draws other examples than a machine that has all",
        code(f"{HELD_OUT}.held_out", "torch.from_numpy(numbers[owner])", "torch.from_numpy(owner)"),
        HOLDS_OUT,
    ),
    Mutant(
        "every client",
        "all clients hold out the same places",
        "the client's number is not in the address",
        code(f"{HELD_OUT}.held_out", "torch.from_numpy(numbers[owner])", "torch.from_numpy(0 * numbers[owner])"),
        HOLDS_OUT,
    ),
    Mutant(
        "every client",
        "what is held out is trained on too",
        "the training part keeps all examples",
        code(f"{HELD_OUT}.split", "return part(~out), part(out)", "return partition, part(out)"),
        HOLDS_OUT,
    ),
    Mutant(
        "every client",
        "a client between two pieces loses its first part",
        "what the piece before had of it is not carried on",
        code(f"{EVALUATION}.Evaluation._one_by_one", "sums[name][0] += one", "pass"),
        ON_ITS_OWN,
    ),
    Mutant(
        "every client",
        "clients of a piece are counted from its start",
        "the k-th client of a piece gets the sums of client k",
        code(
            f"{EVALUATION}.Evaluation.by_client",
            "total.index_add_(0, clients, sums)",
            "total.index_add_(0, torch.arange(len(clients)), sums)",
        ),
        ON_ITS_OWN,
    ),
    Mutant(
        "every client",
        "what fills a block up is judged",
        "a client with fewer examples than others has some of its own counted again",
        code(
            f"{EVALUATION}.Evaluation._together",
            "            kept = torch.from_numpy(np.arange(block.shape[1]) < lengths[:, None]).to(self.device)\n",
            "            lengths = np.full(len(lengths), block.shape[1])\n"
            "            kept = torch.ones(block.shape, dtype=torch.bool)\n",
        ),
        EACH_ITS_OWN,
    ),
    Mutant(
        "every client",
        "who has examples left is judged by another's model",
        "the k-th of these clients gets the k-th model of all",
        code(
            f"{EVALUATION}.Evaluation._together", "at = torch.from_numpy(places[still])", "at = torch.from_numpy(still)"
        ),
        EACH_ITS_OWN,
    ),
    Mutant(
        "every client",
        "a model's later examples go to another client",
        "sums of a later block are added from the first client on",
        code(
            f"{EVALUATION}.Evaluation._together",
            "before.index_add(0, torch.from_numpy(still).to(sums.device), sums)",
            "before.index_add(0, torch.arange(len(still)), sums)",
        ),
        EACH_ITS_OWN,
    ),
    Mutant(
        "every client",
        "the worst tenth is the best one",
        "accuracies and losses are taken from the wrong end",
        code(f"{RESULTS}.summary", "if rises(measure) else", "if not rises(measure) else"),
        STATISTICS,
    ),
    Mutant(
        "every client",
        "the worst tenth is rounded down",
        "of eleven clients one and not two",
        code(f"{RESULTS}.summary", "ordered[: -(-len(values) // 10)]", "ordered[: max(1, len(values) // 10)]"),
        STATISTICS,
    ),
    Mutant(
        "every client",
        "Jain's index is not divided by n",
        "(Σ a)² / Σ a²: between 1 and n",
        code(f"{RESULTS}.summary", "(len(values) * squares)", "squares"),
        STATISTICS,
    ),
    Mutant(
        "every client",
        "clients without test examples count",
        "as if they had got 0",
        code(
            f"{RESULTS}.ClientResults.record",
            "there = ~np.isnan(values)",
            "there, values = values != -1, np.nan_to_num(values)",
        ),
        STATISTICS,
    ),
    Mutant(
        "every client",
        "a client's own model takes û in its stride",
        "its steps begin with û under every momentum policy",
        code(f"{LOOK}.after_steps", "method.rules.begun(start.momentum, job.round_index)", "start.momentum"),
        STEPS,
    ),
    Mutant(
        "every client",
        "a client's own model sees the last round again",
        "its steps take the minibatches that x̂ has been trained on",
        code(
            f"{LOOK}.steps_job",
            "clients_job(problem, plan, round_index,",
            "clients_job(problem, plan, round_index - 1,",
        ),
        STEPS,
    ),
    Mutant(
        "every client",
        "a client's own model takes the round's first lr",
        "its steps must go on with that of the last",
        code(f"{LOOP}._judged", "job.lrs[-1]", "job.lrs[0]"),
        STEPS,
    ),
    Mutant(
        "every client",
        "the last round is not looked at",
        "a run ends without its clients' results",
        code(f"{PLAN}.Plan.looks_at_clients", " or round_number == self.num_rounds", ""),
        TOLD,
    ),
    Mutant(
        "every client",
        "clients.jsonl is not cut back",
        "lines of rounds that a longer run does not look at stay",
        code(f"{HISTORY}._results_of", " if results.round in rounds]", "]"),
        TOLD,
    ),
    Mutant(
        "every client",
        "thinning loses the rounds that looked",
        "a long run's picture of its clients has gaps",
        code(f"{HISTORY}.thinned", "(own and looked % step == 0)", "False"),
        "tests/results/test_clients.py::test_a_long_run_keeps_the_rounds_that_looked",
    ),
    Mutant(
        "every client",
        "every client's own model is made of the first one's tensors",
        "a node gets another client's u, state and tensors",
        code(f"{OWN_DATA}._ask", "v[client : client + 1]", "v[:1]"),
        "tests/flower/test_every_client.py::test_clients_tell_what_the_engine_finds",
    ),
    Mutant(
        "every client",
        "every client judges the first one's row",
        "under Algorithm 2 a client is sent another's model as its own",
        code(f"{OWN_DATA}._ask", "row_of(state, client)", "row_of(state, 0)"),
        "tests/flower/test_every_client.py::test_clients_tell_what_the_engine_finds",
    ),
    Mutant(
        "every client",
        "what clients told once is told for ever",
        "own results are those of the model that was evaluated last",
        code(f"{OWN_DATA}.own_results", "told[0] is state and job is None", "job is None"),
        "tests/flower/test_every_client.py::test_clients_tell_what_the_engine_finds",
    ),
    Mutant(
        "every client",
        "half of the first line of clients.jsonl stays",
        "a run that was killed while it wrote it writes on behind it",
        code(f"{HISTORY}._write_results", "(folder / RESULTS).unlink(missing_ok=True)", "pass"),
        "tests/records/test_history.py::test_a_kill_at_any_byte_of_clients_jsonl_loses_nothing_that_a_checkpoint_covers",
    ),
    Mutant(
        "every client",
        "what follows a broken line of clients.jsonl is thrown away",
        "a resume cuts it off without a word",
        code(f"{HISTORY}._results_of", "if missing := set(rounds) - there:", "if missing := set():"),
        "tests/records/test_history.py::test_a_kill_at_any_byte_of_clients_jsonl_loses_nothing_that_a_checkpoint_covers",
    ),
    # --- personal ------------------------------------------------------------------------------------------
    Mutant(
        "personal",
        "the momentum of what is personal restarts",
        "every round begins a client's own part with u = 0",
        code(
            f"{OWN}.with_own",
            "joined(rows, job.own, rows if order is None else order)",
            "joined(rows, job.own._replace(momentum={n: 0 * u for n, u in job.own.momentum.items()}),"
            " rows if order is None else order)",
        ),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "what is personal is averaged",
        "every client goes on from the mean of all",
        code(
            f"{LOOP}.after_round",
            "        own=own,\n",
            "        own=own and ClientState(*({n: v.double().mean(0, keepdim=True).to(v.dtype)"
            ".expand_as(v) for n, v in tree.items()} for tree in own)),\n",
        ),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "the mean of what is personal has no weights",
        "clients with many examples count like others in the model that is shown",
        code(f"{LOOP}.after_round", "seen, torch.from_numpy(weights))", "seen, torch.ones(len(weights)))"),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "the mean of what is personal is the first chunk's",
        "clients after the first are left out of the model that is shown",
        code(f"{OWN}.whole_state", "range(0, len(weights), _HELD)", "range(0, 1, _HELD)"),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "what stays is counted as sent",
        "bytes_sent has the personal tensors too",
        code(f"{LOOP}.after_round", "done.outer, begun._replace", "done.outer, done.state._replace"),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "clients that were not drawn lose theirs",
        "their own tensors become 0",
        code(
            f"{OWN}.next_rows",
            "rows.index_copy(0, job.clients, value)",
            "(0 * rows).index_copy(0, job.clients, value)",
        ),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "a cohort takes the first clients' own tensors",
        "the k-th client of a cohort begins with those of client k",
        code(f"{PLAN}.round_job", "rows_of(own, job.clients)", "rows_of(own, torch.arange(len(job.clients)))"),
        PLAIN_ROUNDS,
    ),
    Mutant(
        "personal",
        "a resumed run forgets what was personal",
        "its clients begin with the model's first tensors again",
        code(
            f"{FOLDER}.load",
            "own=own._replace(correction={}) if template.own is not None else None",
            "own=template.own",
        ),
        f"{PERSONAL_ROUNDS}::test_a_resumed_run_has_the_same_bytes",
    ),
    Mutant(
        "personal",
        "who does not answer loses its own",
        "clients of a node that failed get another's tensors",
        code(f"{LOOP}._begun", "outcome.answered.nonzero()[:, 0]", "torch.arange(int(outcome.answered.sum()))"),
        f"{PERSONAL_ROUNDS}::test_on_flower_who_does_not_answer_keeps_its_own",
    ),
    Mutant(
        "personal",
        "a name takes what begins likewise",
        "a.b is a.b1 too",
        code("fedmom.tasks.models.personal._begins", 'name.startswith(beginning + ".")', "name.startswith(beginning)"),
        "tests/tasks/test_personal.py::test_names_are_those_of_the_models_tensors",
    ),
    # --- fragments -----------------------------------------------------------------------------------------
    Mutant(
        "fragments",
        "turns are counted from round 0",
        "part f is exchanged after rounds f − 1, f − 1 + F, …",
        code("fedmom.method.states.fragments.Fragments.due", "(number - self", "(number + 1 - self"),
        f"{FRAGMENTS}::test_the_last_part_of_a_separable_problem_is_algorithm_1_with_as_many_steps_more",
    ),
    Mutant(
        "fragments",
        "u does not wait for its part",
        "the momentum is averaged in every round, and x by parts",
        code(
            "fedmom.method.states.rules.Rules.due",
            "self.fragments.due(parameter, number)",
            "(part == 'momentum' or self.fragments.due(parameter, number))",
        ),
        f"{FRAGMENTS}::test_the_last_part_of_a_separable_problem_is_algorithm_1_with_as_many_steps_more",
    ),
    Mutant(
        "fragments",
        "the outer step goes from the round's start",
        "Δ leaves out what a part moved in the rounds since its last exchange",
        code("fedmom.rounds.outer.outer_step", "rare[n] if n in rare else common[n]", "common[n]"),
        f"{FRAGMENTS}::test_rounds_are_those_of_a_loop_over_clients",
    ),
    Mutant(
        "fragments",
        "everything is counted as sent",
        "bytes_sent knows no parts",
        code(
            "fedmom.method.states.rules.Rules.sends",
            "sends_momentum and self.due(part, name, number)",
            "sends_momentum",
        ),
        f"{FRAGMENTS}::test_algorithm_2_mixes_by_w_part_by_part",
    ),
    Mutant(
        "fragments",
        "Algorithm 2 mixes all of x",
        "W is applied to every part in every round",
        code(f"{MIXING}.combine", "if rules.exchanged(part, n, number)}", "if n}"),
        f"{FRAGMENTS}::test_algorithm_2_mixes_by_w_part_by_part",
    ),
    Mutant(
        "fragments",
        "a buffer goes with the parameter before it",
        "BatchNorm's statistics are in another part than its weight",
        code("fedmom.method.states.fragments.fragments_of", 'firsts.get(name.rpartition(".")[0], before)', "before"),
        f"{FRAGMENTS}::test_a_buffer_is_where_the_parameters_of_its_module_are_or_the_one_before_it",
    ),
    # --- periods -------------------------------------------------------------------------------------------
    Mutant(
        "periods",
        "rounds are counted from 0",
        "a state of period 2 is exchanged after rounds 1, 3, …",
        code(f"{RULES}.due", "return number % self", "return (number - 1) % self"),
        f"{STATE_LAWS}::test_the_golden_run_bit_for_bit",
    ),
    Mutant(
        "periods",
        "a drawn client always goes on from its own u",
        "an exchange that it was not drawn for does not end its row",
        code(f"{OWN_ROWS}.next_rows", "        return None\n    num_clients", "        return old\n    num_clients"),
        f"{STATE_LAWS}::test_a_drawn_client_goes_on_from_its_own_u_or_from_a_newer_average",
    ),
    Mutant(
        "periods",
        "a drawn client always goes on from û",
        "also where it has trained since û was made",
        code(f"{PLAN}.round_job", "job._replace(own=own,", "job._replace(own=None,"),
        f"{STATE_LAWS}::test_a_drawn_client_goes_on_from_its_own_u_or_from_a_newer_average",
    ),
    Mutant(
        "periods",
        "clients that were not drawn lose theirs",
        "they stand at the mean that is looked at",
        code(f"{OWN_ROWS}.next_rows", "known[name] if name in known else expand", "expand"),
        f"{STATE_LAWS}::test_where_x_is_not_exchanged_the_mean_of_all_clients_is_evaluated",
    ),
    Mutant(
        "periods",
        "the cohort's mean is evaluated",
        "clients that were absent are left out where x was not exchanged",
        code(f"{OWN_ROWS}.means_of_all", 'or (part != "momentum" and not everybody)', ""),
        f"{STATE_LAWS}::test_where_x_is_not_exchanged_the_mean_of_all_clients_is_evaluated",
    ),
    Mutant(
        "periods",
        "what is not sent is counted",
        "bytes_sent has a state in every round, whatever its period",
        code(f"{RULES}.sends", " and self.due(part, name, number)", ""),
        f"{STATE_LAWS}::test_what_is_sent_is_counted_in_the_round_that_sends_it",
    ),
    Mutant(
        "periods",
        "buffers are averaged in every round",
        "also where x, which they belong to, is not",
        code(f"{RULES}.keeps", '("params", "momentum", "buffers")', '("params", "momentum")'),
        f"{STATE_LAWS}::test_small_nets_are_the_plain_loops",
    ),
    Mutant(
        "periods",
        "W mixes u in every round",
        "under Algorithm 2 the optimizer's states have no period",
        code(f"{MIXING}.combine", 'if rules.due("momentum", name, number):', "if True:"),
        f"{STATE_LAWS}::test_fixed_points_of_algorithm_2_on_the_path_of_3",
    ),
    Mutant(
        "periods",
        "W mixes x in every round",
        "under Algorithm 2 x has no period",
        code(f"{MIXING}.combine", "if rules.exchanged(part, n, number)}", "if part}"),
        "tests/laws/test_states_of_backends.py::test_mixing_by_policy_and_period",
    ),
    Mutant(
        "periods",
        "the outer step takes Δ from where the round began",
        "where x is exchanged every other round, half of the change is lost",
        code(f"{OUTER_ROUNDS}.outer_step", "rare[n] if n in rare else common[n]", "common[n]"),
        f"{STATE_LAWS}::test_small_nets_are_the_plain_loops",
    ),
    Mutant(
        "periods",
        "the outer step takes Δ from the first x for ever",
        "what was exchanged last is not remembered",
        code(
            f"{OUTER_ROUNDS}.outer_step",
            "for n, t in moved.items() if n in rare",
            "for n, t in moved.items() if not rare",
        ),
        f"{STATE_LAWS}::test_small_nets_are_the_plain_loops",
    ),
    Mutant(
        "periods",
        "the outer step moves clocks",
        "a bias correction that no state has",
        code(f"{OUTER_ROUNDS}.stepped_of", ' and CLOCK not in name.partition("/")[0]', ""),
        f"{OUTER_LAWS}::test_neither_buffers_nor_clocks_are_stepped",
    ),
    Mutant(
        "periods",
        "Nesterov's outer step takes the old b",
        "x − η(Δ + μb) with b before the step",
        code(
            f"{OUTER}.nesterov",
            "(delta[name] + by.momentum * b[name])",
            '(delta[name] + by.momentum * memory["b"][name])',
        ),
        f"{OUTER_LAWS}::test_golden_rounds",
    ),
    Mutant(
        "periods",
        "SlowMo's memory is of changes",
        "Δ is not divided by γ: another γ changes what is remembered",
        both(
            code(f"{OUTER}.slowmo", "(x - mean[name]) / lr", "(x - mean[name])"),
            code(f"{OUTER}.slowmo", "by.lr * lr * slow[name]", "by.lr * slow[name]"),
        ),
        f"{OUTER_LAWS}::test_a_new_lr_tells_slowmo_from_fedavgm",
    ),
    Mutant(
        "periods",
        "the adaptive steps begin with v = 0",
        "v⁰ is τ²",
        code(f"{OUTER}.OuterRule.start", "self.numbers.tau**2", "0.0"),
        f"{OUTER_LAWS}::test_golden_rounds",
    ),
    Mutant(
        "periods",
        "a resumed run begins its outer step anew",
        "what it remembered is the first round's",
        code("fedmom.records.folder._memories", '{"outer": outer,', '{"outer": template.outer,'),
        "tests/runs/test_resume_states.py::test_a_run_goes_on_from_every_round_to_the_same_bytes",
    ),
    Mutant(
        "periods",
        "who does not answer loses its own row",
        "under `proceed` it goes on from the mean of the others",
        code(f"{OWN_ROWS}.next_rows", "known[name] if name in known else expand", "expand"),
        "tests/laws/test_states_of_backends.py::test_who_does_not_answer_goes_on_from_where_it_was",
    ),
    Mutant(
        "periods",
        "PRSGDM alone steps x and nothing else",
        "outer-states = 'x, u' is not heard",
        code(
            f"{PRSGDM}._begin",
            "stepped_of(self.outer, start)",
            '{n: t for n, t in stepped_of(self.outer, start).items() if n.startswith("params/")}',
        ),
        "tests/laws/test_states_of_backends.py::test_the_strategy_alone_takes_the_outer_step",
    ),
    Mutant(
        "periods",
        "the last exchanged x shares memory with x",
        "no checkpoint can be written after an exchange",
        code(f"{OUTER_ROUNDS}.outer_step", "n: t.clone()", "n: t"),
        "tests/runs/test_resume_states.py::test_a_run_goes_on_from_every_round_to_the_same_bytes",
    ),
    Mutant(
        "periods",
        "a client's own is taken from whoever sends it",
        "it goes on from a row where all go on from the average",
        code(
            "strategies.prsgdm.PRSGDM._accept",
            "own = expand(self.returns, len(clients))",
            "own = expand(self.returns, len(clients)) if self.returns else None",
        ),
        "tests/laws/test_states_of_backends.py::test_what_a_client_has_of_its_own_is_refused_where_nobody_asked_for_it",
    ),
    # --- intervals -----------------------------------------------------------------------------------------
    Mutant(
        "intervals",
        "minibatches go by rounds of the first I",
        "a round that takes fewer steps begins at round × I₀",
        code(f"{PLAN}.Plan.span", "Span(done.steps,", "Span(done.round * self.num_local_steps,"),
        f"{INTERVALS}::test_minibatches_and_learning_rates_go_by_the_steps_that_were_taken",
    ),
    Mutant(
        "intervals",
        "T is R times the first I",
        "a schedule by fractions of the run counts steps that are never taken",
        code(f"{PLAN}.Plan.horizon", "if self.changes_steps:", "if False:"),
        f"{INTERVALS}::test_minibatches_and_learning_rates_go_by_the_steps_that_were_taken",
    ),
    Mutant(
        "intervals",
        "ρ counts clients, whatever they weigh",
        "N − 1 in the place of 1/Σp² − 1",
        code(f"{LOOP}._next_interval", "job.weights.sum() ** 2 / (job.weights**2).sum()", "len(job.weights)"),
        f"{INTERVALS}::test_minibatches_and_learning_rates_go_by_the_steps_that_were_taken",
    ),
    Mutant(
        "intervals",
        "ρ forgets N − 1",
        "Σ p_i ‖x_i − x̂‖² is compared with how far x̂ moved itself",
        code(f"{SCHEDULES}.adaptive", "(came.clients - 1) * came.moved", "came.moved"),
        f"{INTERVALS}::test_a_rule_looks_at_more_than_noise_and_at_more_clients_than_one",
    ),
    Mutant(
        "intervals",
        "a resume begins with the first I again",
        "the checkpoint's interval is not read",
        code(f"{FOLDER}.load", 'int(about["interval"])', "template.interval"),
        f"{INTERVALS}::test_a_resumed_run_goes_on_with_its_interval_and_flower_is_told_it",
    ),
    Mutant(
        "intervals",
        "clients under Flower take the first I",
        "the message does not say how many steps a round has",
        code(
            "clients.client_app._span", 'Span(asked["first-step"], asked["num-steps"])', "Span(asked['first-step'], 8)"
        ),
        f"{INTERVALS}::test_a_resumed_run_goes_on_with_its_interval_and_flower_is_told_it",
    ),
    Mutant(
        "codecs",
        "one ξ for all clients",
        "the errors of the messages are alike, and their mean does not fall with N",
        code(f"{TRAVEL}.codec.Address.bits", "to(device)[:, None]", "to(device)[:, None] * 0"),
        f"{EACH_CODEC}::test_the_mean_over_clients_rounds_and_tensors_is_the_value",
    ),
    Mutant(
        "codecs",
        "the same ξ in every round",
        "a client errs the same way for ever",
        code(f"{TRAVEL}.codec.Address.bits", "self.round_index", "0"),
        f"{EACH_CODEC}::test_the_mean_over_clients_rounds_and_tensors_is_the_value",
    ),
    Mutant(
        "codecs",
        "integers are rounded to the nearest",
        "what is less than half a step never arrives",
        code(f"{TRAVEL}.codecs.integers.Integers.encode", "address.uniform(count, rows.device, dtype)", "0.5"),
        f"{EACH_CODEC}::test_the_mean_over_clients_rounds_and_tensors_is_the_value",
    ),
    Mutant(
        "codecs",
        "bytes without the scales",
        "a block of few numbers seems to take no more than one of many",
        code(
            f"{TRAVEL}.codecs.integers.Integers.form",
            ', "scales": array_form((-(-count // self.block),), torch.float32)',
            "",
        ),
        f"{EACH_CODEC}::test_a_message_takes_the_bytes_that_are_counted",
    ),
    Mutant(
        "codecs",
        "bytes without the indices",
        "top-k seems to take half of what it takes",
        code(f"{TRAVEL}.codecs.topk.TopK.form", ', "indices": array_form((k,), torch.int32)', ""),
        f"{EACH_CODEC}::test_a_message_takes_the_bytes_that_are_counted",
    ),
    Mutant(
        "codecs",
        "of equal numbers the last",
        "two ends that sort otherwise take other places",
        code(f"{TRAVEL}.codecs.topk.TopK.encode", "equal.cumsum(1)", "equal.flip(1).cumsum(1).flip(1)"),
        f"{EACH_CODEC}::test_top_k_is_contractive_and_takes_the_lower_of_equal_numbers",
    ),
    Mutant(
        "codecs",
        "random-k without its d/k",
        "what goes without feedback arrives too small",
        code(
            f"{TRAVEL}.codecs.randomk.RandomK.decode", " if self.scaled else values", " if not self.scaled else values"
        ),
        f"{EACH_CODEC}::test_the_mean_over_clients_rounds_and_tensors_is_the_value",
    ),
    Mutant(
        "codecs",
        "Q is forgotten",
        "every round begins at a random subspace again",
        code(f"{TRAVEL}.codecs.lowrank.LowRank.encode", '{"Q": right.to(rows.dtype)}\n', "dict(state)\n"),
        f"{EACH_CODEC}::test_low_rank_is_a_projection_and_goes_to_the_svd",
    ),
    Mutant(
        "codecs",
        "the error with the wrong sign",
        "what was left behind is taken away once more",
        code(f"{TRAVEL}.feedback._one", "wanted - arrived", "arrived - wanted"),
        f"{FEEDBACK}::test_what_is_common_and_what_is_kept_move_together_by_the_mean_change",
    ),
    Mutant(
        "codecs",
        "the error is kept and never sent",
        "top-1 goes the wrong way for ever",
        code(f"{TRAVEL}.feedback._one", "wanted + own[ERROR]", "wanted"),
        f"{FEEDBACK}::test_top_1_goes_the_wrong_way_alone_and_ends_right_with_feedback",
    ),
    Mutant(
        "codecs",
        "v by its change",
        "a change that is rounded takes v to 0 or below, and the step is m/ε",
        code(f"{TRAVEL}.feedback._one", "whole = state in POSITIVE", "whole = False"),
        f"{FEEDBACK}::test_v_stays_positive_and_keeps_its_small_numbers",
    ),
    Mutant(
        "codecs",
        "an address by place",
        "what a client sends depends on the chunk that it is in",
        code("fedmom.rounds.own.without_own", "job.seed, job.clients,", "job.seed, torch.arange(len(job.clients)),"),
        f"{CODED}::test_without_feedback_nobody_keeps_anything",
    ),
    Mutant(
        "codecs",
        "dense layers without rows under a codec",
        "there is nothing to encode",
        code("fedmom.engine.stacked.runner.StackRunner._has_own", "or method.codecs", ""),
        f"{CODED}::test_without_feedback_nobody_keeps_anything",
    ),
    Mutant(
        "codecs",
        "bytes as without a codec",
        "a run seems to send what it does not",
        code(f"{PLAN}.bytes_per_exchange", "method.codecs", "{}"),
        f"{CODED}::test_a_run_with_top_k_is_the_one_by_hand",
    ),
    Mutant(
        "codecs",
        "the server goes on from the clients' mean",
        "what its message left behind is lost",
        code(f"{TRAVEL}.reference.after_mean", "old[n] + (m - reference[n]) if n in reference else m", "m"),
        f"{CODED}::test_a_run_with_top_k_is_the_one_by_hand",
    ),
    Mutant(
        "codecs",
        "who missed a message gets the next one",
        "it has another reference than the server, and the bytes are too few",
        code(f"{PLAN}.Plan.bytes_received", "in_few * few + (len(ids) - in_few) * whole", "len(ids) * few"),
        f"{CODED}::test_a_run_with_top_k_is_the_one_by_hand",
    ),
    Mutant(
        "codecs",
        "a resumed run begins with another reference",
        "clients begin at x⁰ again",
        code("fedmom.records.folder._memories", "tensors[_REFERENCE + name].to(device)", "reference[name]"),
        f"{CODED}::test_a_resumed_run_ends_with_the_same_bytes",
    ),
    Mutant(
        "codecs",
        "x before the round is the server's",
        "what a correction's server is told of is not where its clients began",
        code(f"{LOOP}.after_round", "share, job, sent_down.params)", "share, job, begun.params)"),
        f"{CODED}::test_where_a_round_began_is_where_its_clients_did",
    ),
    Mutant(
        "codecs",
        "ρ is of the way from the server's x",
        "an adaptive I is halved by how far the reference was behind",
        code(f"{LOOP}._next_interval", "(begun if done.reference is None else", "(begun if True else"),
        f"{CODED}::test_where_a_round_began_is_where_its_clients_did",
    ),
    Mutant(
        "codecs",
        "the other end draws for another round",
        "random-k's numbers are put at places that nobody sent",
        code(
            f"{TRAVEL}.messages._read",
            "senders.address(part, name)",
            "senders._replace(round_index=0).address(part, name)",
        ),
        f"{MESSAGES}::test_what_is_read_is_what_was_sent_and_takes_the_bytes_that_are_counted",
    ),
    Mutant(
        "codecs",
        "the other end draws for another client",
        "random-k's numbers are put at places that somebody else sent",
        code(
            f"{TRAVEL}.messages._read",
            "senders.address(part",
            "senders._replace(clients=senders.clients * 0).address(part",
        ),
        f"{MESSAGES}::test_what_is_read_is_what_was_sent_and_takes_the_bytes_that_are_counted",
    ),
    Mutant(
        "codecs",
        "v arrives as a change",
        "what is itself is added to what was common",
        code(f"{TRAVEL}.messages._read", "value, whole=whole", "value, whole=False"),
        f"{MESSAGES}::test_what_is_read_is_what_was_sent_and_takes_the_bytes_that_are_counted",
    ),
    Mutant(
        "codecs",
        "bfloat16 is turned into whole numbers",
        "its bits are cut off behind the point",
        code(f"{TRAVEL}.wire.to_wire", "v.view(_BFLOAT16)", "v.to(_BFLOAT16)"),
        f"{MESSAGES}::test_what_is_read_is_what_was_sent_and_takes_the_bytes_that_are_counted",
    ),
    Mutant(
        "codecs",
        "clients' messages from the last to the first",
        "a message is read as another client's",
        code(f"{TRAVEL}.feedback._add", "[messages[name], own]", "[own, messages[name]]"),
        f"{MESSAGES}::test_every_way_of_the_engine_writes_the_same_message_and_comes_to_the_same_as_without",
    ),
    Mutant(
        "codecs",
        "a message in the memory of what arrives",
        "an engine writes over it",
        code(f"{TRAVEL}.feedback._add", 'value.to("cpu", copy=True)', 'value.to("cpu")'),
        f"{MESSAGES}::test_no_number_of_a_message_changes_afterwards",
    ),
    Mutant(
        "codecs",
        "a place twice in one message",
        "the order in which it is written decides",
        code(f"{TRAVEL}.codecs.topk.TopK.faults", "indices[1:] <= indices[:-1]", "indices[1:] < indices[:-1]"),
        f"{MESSAGES}::test_what_a_payload_can_be_wrong_in_is_refused",
    ),
    Mutant(
        "codecs",
        "a row of finite arrays is taken to be finite",
        "two factors of 1e38 make infinity of the mean",
        code(f"{TRAVEL}.messages._read", "if not _is_finite(row)", "if False"),
        f"{MESSAGES}::test_what_a_payload_can_be_wrong_in_is_refused",
    ),
    Mutant(
        "codecs",
        "what goes down draws for the round before",
        "clients begin at another reference than the server's",
        code(f"{TRAVEL}.messages.read_reference", "round_index), ", "round_index - 1), "),
        f"{MESSAGES}::test_both_ends_of_what_goes_down_have_one_reference",
    ),
    Mutant(
        "codecs",
        "a round begins with the message before",
        "clients are a message behind",
        code(f"{LOOP}.after_round", "message=message", "message=done.message"),
        f"{MESSAGES}::test_both_ends_of_what_goes_down_have_one_reference",
    ),
    Mutant(
        "periods",
        "rows of no checkpoint stay",
        "a folder keeps N models that nothing reads",
        code(f"{FOLDER}.save", "if not rows:", "if False:"),
        "tests/runs/test_resume_states.py::test_rows_that_belong_to_no_checkpoint_do_not_stay",
    ),
    Mutant(
        "named",
        "a preset's optimizer wins when it is resolved again",
        "a run of local-adam with lion cannot go on",
        code("fedmom.config.method.named._settle_preset", "full in given or now != default or", "full in given or"),
        "tests/config/test_named.py::test_a_preset_with_another_optimizer_stays_so_whoever_resolves_it_again",
    ),
    Mutant(
        "failures",
        "rows are brought as nodes have them now",
        "a checkpoint of one round has the rows of the next",
        code(f"{LEDGER}.Ledger.there", "self.since.copy()", "self.since"),
        f"{LOST}::test_what_is_saved_of_a_round_is_not_of_the_next_one_that_clients_have_trained_meanwhile",
    ),
    Mutant(
        "failures",
        "every row that was ever made is asked for",
        "a node that starts anew ends a run that needs nothing of it",
        code(f"{LEDGER}.Ledger.counts", "(newer or bool(self.turns.states))", "True"),
        f"{LOST}::test_a_row_that_says_nothing_any_more_is_not_missed",
    ),
    Mutant(
        "failures",
        "states that nobody asked a node for are taken",
        "they are put in the place of the clients' own",
        code("strategies.at_nodes.rounds.Sends._accept", "states={}, ", ""),
        f"{LOST}::test_a_reply_that_says_something_else_is_refused_in_one_line",
    ),
    Mutant(
        "failures",
        "a node looks through all of its records for one",
        "a round takes the square of its clients",
        code("clients.kept.ContextStore.read", "self.state[", "self.state.array_records["),
        f"{LOST}::test_a_node_looks_at_no_other_record_for_one",
    ),
]
