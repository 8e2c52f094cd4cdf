"""Names that keys may take and that belong to no other part of fedmom, each with what it means."""

BACKENDS = {
    "engine": "fedmom's own engine, on one device",
    "simulation": "Flower's messages, on Ray actors of this machine",
    "flower": "recorded in a run that `flwr run` started; not to be set",
}
DTYPES = {
    "auto": "float64 for quadratic, else float32",
    "float32": "single precision",
    "float64": "double precision, for checks of the mathematics",
    "bfloat16": "half the memory and the memory traffic; three digits of precision, so small steps are lost",
}
MATMULS = {
    "float32": "exact to rounding",
    "tf32": "on a GPU, factors rounded to 10 bits, several times as fast; a CPU ignores it",
}
DEVICES = {"auto": "a GPU where there is one", "cpu": "the processor", "cuda": "an NVIDIA GPU"}
CLIENT_WEIGHTS = {"uniform": "1/N each: the paper", "samples": "in proportion to the clients' examples"}
RUNNING_VARS = {
    "pooled": "the variance of all clients' activations together",
    "mean": "the mean of the clients' variances",
}
ON_FAILURE = {
    "stop": "the run stops, and the error names the client",
    "retry": "the client is asked again (server.retries times), then the run stops",
    "proceed": "the round averages over the others, at least server.min-clients of them",
}
OWN_ROWS = {
    "auto": "with the nodes, where algorithm.states, fragments or codecs say what travels and messages leave the "
    "machine; else with the server",
    "nodes": "every node keeps what its clients have of their own, and sends it for a checkpoint alone",
    "server": "the server keeps it and sends it along in every round, so a node that starts anew has lost nothing",
}
ON_LINK_FAILURE = {
    "stop": "the run stops, and the error names the link",
    "skip": "both clients keep the weight of that link for themselves (symmetric W only)",
}
