"""What hatch adds to the wheel: the Flower app, its image and the configurations, under the private name fedmom/_app.

In the repository they stay at the top; in site-packages nothing is called clients, strategies, configs or deploy.
An editable install has the checkout itself, and gets no copies that would grow old.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# README.md and LICENSE are for Flower's bundle, .dockerignore keeps compiled code out of the image.
APP = (
    *("strategies", "clients", "configs", "deploy", "Dockerfile", ".dockerignore", "constraints.txt"),
    *("pyproject.toml", "README.md", "LICENSE"),
)


class CustomBuildHook(BuildHookInterface):
    """Called by hatchling for every wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"].update({name: f"fedmom/_app/{name}" for name in APP})
