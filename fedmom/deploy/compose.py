"""The Compose files: a federation on one machine, or its server and each of its clients on machines of their own.

docker-compose.yml, docker-compose.gpu.yml and deploy/*.yml in the checkout are what these functions give (a test keeps
them equal).
"""

_SERVICE = """\
# Nothing between the containers goes through a proxy that Docker's configuration names.
x-direct: &direct {NO_PROXY: "*", no_proxy: "*"}

x-service: &service
  image: ${FEDMOM_IMAGE:-fedmom}
  user: ${FEDMOM_USER:-10001:10001}
  restart: unless-stopped
  init: true
  read_only: true
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  labels: {fedmom.deployment: "${FEDMOM_ID:-}"}
  tmpfs: ["/tmp:mode=1777,size=${FEDMOM_TMP:-1g}"]
  logging: {driver: json-file, options: {max-size: 10m, max-file: "3"}}

services:
"""

_FEDERATION = """\
# A whole federation on one machine: the SuperLink (TLS, node authentication), its gate, the server's app, and clients.
#
#   fedmom deploy init                              # keys and certificates, below ./deployment
#   fedmom deploy run configs/deploy.toml           # up, train, fetch the run folder
#   docker compose --env-file deployment/.env ps    # from then on, like any project of Compose
#
# Written by fedmom/deploy/compose.py; for another number of clients: `fedmom deploy init --clients N`.
name: fedmom

"""

_SERVER = """\
# The server's machine: the SuperLink, its gate and the server's app. Clients on other machines run deploy/client.yml.
#
# `fedmom deploy init --address HOST` copies this file as compose.yml into deployment/server, beside the keys it needs;
# `fedmom deploy up` starts it from there. Written by fedmom/deploy/compose.py.
name: fedmom-server

"""

_CLIENT = """\
# One client on its own machine: the SuperNode, which talks to the server, and the app, which has the data (and a GPU).
#
# `fedmom deploy init --address HOST` copies this file as compose.yml into deployment/client-0, client-1, …, each beside
# its keys and an .env. Bring one such folder to the client's machine, put data into its data/, and there
# `docker compose up --detach`. Written by fedmom/deploy/compose.py.
name: fedmom-client

"""

_SERVER_SERVICES = """\
  superlink:
    <<: *service
    command:
      - flower-superlink
      - --host=0.0.0.0
      - --port=8000
      - --isolation=process
      - --database=/state/state.db
      - --enable-supernode-auth
      - --superexec-auth-secret-file=/run/secrets/server-superexec
      - --ssl-ca-certfile=/run/secrets/ca
      - --ssl-certfile=/run/secrets/server-certificate
      - --ssl-keyfile=/run/secrets/server-key
    environment: {HEALTH: "https://127.0.0.1:8000/health", <<: *direct}
    secrets: [ca, server-certificate, server-key, server-superexec]
    volumes: ["state:/state"]
    networks: [server]
    deploy: {resources: {limits: {cpus: "2", memory: 4g, pids: 512}}}

  # For `flwr` on this machine, and nobody else: who reaches the SuperLink can start a run. The port is on loopback, and
  # the door turns away whoever comes past it, straight to the container's address (deploy/image/door.conf).
  door:
    <<: *service
    command: [door]
    environment: {HEALTH: "https://127.0.0.1:8000/health", <<: *direct}
    depends_on: {superlink: {condition: service_healthy}}
    secrets: [ca, server-certificate, server-key]
    tmpfs: ["/tmp:mode=1777,size=64m"]
    ports: ["127.0.0.1:${FEDMOM_CONTROL_PORT:-@CONTROL@}:8000"]
    networks: [control, server]
    deploy: {resources: {limits: {cpus: "1", memory: 256m, pids: 64}}}

  # All that SuperNodes see: it passes their requests to the SuperLink, and no others (deploy/image/gate.conf).
  gate:
    <<: *service
    command: [nginx, -e, stderr, -c, /opt/fedmom/gate.conf, -g, daemon off;]
    environment: {HEALTH: "https://127.0.0.1:8000/health", <<: *direct}
    depends_on: {superlink: {condition: service_healthy}}
    secrets: [ca, server-certificate, server-key]
    # Less than its memory, of which it is a part: whoever sends what is never finished fills this, and kills nobody.
    tmpfs: ["/tmp:mode=1777,size=512m"]
@GATE@    deploy: {resources: {limits: {cpus: "1", memory: 1g, pids: 64}}}

  serverapp:
    <<: *service
    command:
      - flower-superexec
      - --runtime-api-address=superlink:8000
      - --root-certificates=/run/secrets/ca
      - --superexec-auth-secret-file=/run/secrets/server-superexec
      - --health-server-address=0.0.0.0:9099
    environment: {HEALTH: "tcp://127.0.0.1:9099 heard:60", OMP_NUM_THREADS: "${FEDMOM_THREADS:-1}", <<: *direct}
    depends_on: {superlink: {condition: service_healthy}}
    secrets: [ca, server-superexec]
    volumes: ["runs:/runs", "@SERVER@/data:/data:ro"]
    networks: [server]
    deploy: {resources: {limits: {cpus: "${FEDMOM_CPUS:-2}", memory: "${FEDMOM_MEMORY:-4g}", pids: 512}}}
"""

_CLIENT_SERVICES = """\
  supernode@C@:
    <<: *service
    command:
      - flower-supernode
      - --superlink=@ADDRESS@
      - --root-certificates=/run/secrets/ca
      - --auth-supernode-private-key=/run/secrets/node@C@
      - --isolation=process
      - --host=0.0.0.0
      - --port=9094
      - --superexec-auth-secret-file=/run/secrets/superexec@C@
      - --node-config=partition-id=@CLIENT@ num-partitions=@N@ data-dir="/data"
    environment:
      HEALTH: "http://127.0.0.1:9094/health heard:90"
      FEDMOM_POLL_SECONDS: "${FEDMOM_POLL_SECONDS:-0.5}"
@DIRECT@@DEPENDS@    secrets: [ca, node@C@, superexec@C@]
    networks: [fleet, client@C@]
    deploy: {resources: {limits: {cpus: "1", memory: 2g, pids: 512}}}

  clientapp@C@:
    <<: *service
    command:
      - flower-superexec
      - --insecure
      - --runtime-api-address=supernode@C@:9094
      - --superexec-auth-secret-file=/run/secrets/superexec@C@
      - --health-server-address=0.0.0.0:9099
    environment: {HEALTH: "tcp://127.0.0.1:9099 heard:60", OMP_NUM_THREADS: "${FEDMOM_THREADS:-1}", <<: *direct}
    depends_on: {supernode@C@: {condition: service_started}}
    secrets: [superexec@C@]
    volumes: ["@DATA@:/data:ro"]
    networks: [client@C@]
    deploy: {resources: {limits: {cpus: "${FEDMOM_CPUS:-2}", memory: "${FEDMOM_MEMORY:-4g}", pids: 512}}}
"""

_SERVER_SECRETS = """\
  server-certificate: {file: @SERVER@/server.pem}
  server-key: {file: @SERVER@/server-key.pem}
  server-superexec: {file: @SERVER@/superexec.key}
"""

_CLIENT_SECRETS = """\
  node@C@: {file: @FOLDER@/node.key}
  superexec@C@: {file: @FOLDER@/superexec.key}
"""

_NETWORKS = """
# The apps' networks are internal: code that a run brings reaches its SuperLink or SuperNode, what listens on all
# addresses of the machine itself, and nothing else.
networks:
"""

_VOLUMES = """
# No two deployments share one, whatever their names are.
volumes:
  state: {name: "${COMPOSE_PROJECT_NAME}_state${FEDMOM_ID:+_$FEDMOM_ID}"}
  runs: {name: "${COMPOSE_PROJECT_NAME}_runs${FEDMOM_ID:+_$FEDMOM_ID}"}
"""

_GPU_HEAD = """\
# Every client's app gets all NVIDIA GPUs (docs/gpu-host.md: how to give it one), with an image built for CUDA:
#
#   @COMMAND@
x-gpu: &gpu
  image: ${FEDMOM_GPU_IMAGE:-fedmom:gpu}
  deploy: {resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}

services:
"""
_GPU = "  clientapp@C@:\n    <<: *gpu\n"


def federation(num_clients: int, folder: str = ".") -> str:
    """The Compose file for one machine; `folder`, as seen from the file, holds what `fedmom deploy init` made."""
    server = {"CONTROL": "8000", "SERVER": f"{folder}/server", "GATE": "    networks: [server, fleet]\n"}
    clients = [
        {
            "C": f"-{c}",
            "CLIENT": str(c),
            "N": f"${{FEDMOM_CLIENTS:-{num_clients}}}",
            "ADDRESS": "gate:8000",
            "DEPENDS": "    depends_on: {gate: {condition: service_healthy}}\n",
            "DIRECT": "      <<: *direct\n",
            "FOLDER": f"{folder}/client-{c}",
            "DATA": f"{folder}/client-{c}/data",
        }
        for c in range(num_clients)
    ]
    internal = ["fleet", "server", *(f"client-{c}" for c in range(num_clients))]
    return _file(_FEDERATION, folder, [server], clients, open_networks=["control"], internal_networks=internal)


def server() -> str:
    """The Compose file of a server whose clients are elsewhere; everything it needs lies beside it."""
    port = '    ports: ["${FEDMOM_LISTEN:-0.0.0.0}:${FEDMOM_PORT:-8000}:8000"]\n'
    words = {"CONTROL": "8001", "SERVER": ".", "GATE": f"{port}    networks: [server, world]\n"}
    return _file(_SERVER, ".", [words], [], open_networks=["control", "world"], internal_networks=["server"])


def client() -> str:
    """The Compose file of one client on its own machine; everything it needs lies beside it."""
    words = {
        "C": "",
        "CLIENT": "${FEDMOM_CLIENT:?its number, 0 … FEDMOM_CLIENTS - 1, is in .env}",
        "N": "${FEDMOM_CLIENTS:?how many clients there are is in .env}",
        "ADDRESS": "${FEDMOM_SERVER:?the server's HOST:PORT is in .env}",
        "DEPENDS": "",
        # The way to the server may need a proxy: FEDMOM_NO_PROXY= in .env says so.
        "DIRECT": "".join(f'      {name}: "${{FEDMOM_NO_PROXY-*}}"\n' for name in ("NO_PROXY", "no_proxy")),
        "FOLDER": ".",
        "DATA": "${FEDMOM_DATA:-./data}",
    }
    return _file(_CLIENT, ".", [], [words], open_networks=["fleet"], internal_networks=["client"])


def _file(
    head: str,
    folder: str,
    servers: list[dict[str, str]],
    clients: list[dict[str, str]],
    *,
    open_networks: list[str],
    internal_networks: list[str],
) -> str:
    """A Compose file of these services, each given by the words for its template."""
    services = [_filled(_SERVER_SERVICES, words) for words in servers]
    services += [_filled(_CLIENT_SERVICES, words) for words in clients]
    secrets = [f"  ca: {{file: {folder}/ca.pem}}\n"]
    secrets += [_filled(_SERVER_SECRETS, words) for words in servers]
    secrets += [_filled(_CLIENT_SECRETS, words) for words in clients]
    networks = [f"  {name}: {{}}\n" for name in open_networks]
    networks += [f"  {name}: {{internal: true}}\n" for name in internal_networks]
    parts = [head, _SERVICE, "\n".join(services), "\nsecrets:\n", *secrets, _NETWORKS, *networks]
    return "".join([*parts, *([_VOLUMES] if servers else [])])


def gpu_override(num_clients: int) -> str:
    """The Compose file to add where the clients on one machine have GPUs."""
    command = "docker compose -f docker-compose.yml -f docker-compose.gpu.yml --env-file deployment/.env up -d"
    head = _filled(_GPU_HEAD, {"COMMAND": command})
    return head + "".join(_filled(_GPU, {"C": f"-{c}"}) for c in range(num_clients))


def client_gpu_override() -> str:
    """The same for a client on its own machine."""
    return _filled(_GPU_HEAD + _GPU, {"COMMAND": "docker compose -f compose.yml -f gpu.yml up --detach", "C": ""})


def _filled(text: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        text = text.replace(f"@{name}@", value)
    return text
