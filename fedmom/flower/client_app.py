"""What [tool.flwr.app.components] names: the ClientApp of clients/, under a name that no project of a user's has."""

from fedmom.user_code import own_app

app = own_app("clients")
