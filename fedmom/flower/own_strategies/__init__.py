"""strategies/ under a name that no project of a user's has, and that can be imported wherever fedmom is."""

from fedmom.user_code import own_folder

__path__ = [own_folder("strategies")]
