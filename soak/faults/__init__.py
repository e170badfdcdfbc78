"""What the nemesis does to whole deployments, one function a kind. Each undoes what it did before it returns."""

from soak.faults import databases, deployments, network, operators, processes
from soak.faults.scene import KINDS, Scene, possible

__all__ = ["KINDS", "Scene", "databases", "deployments", "network", "operators", "possible", "processes"]
