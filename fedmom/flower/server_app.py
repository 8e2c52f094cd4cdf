"""What [tool.flwr.app.components] names: the ServerApp of strategies/, under a name that no project of a user's has."""

from fedmom.user_code import own_app

app = own_app("strategies")
