"""Valid arguments of the family's module; it has no public function."""

from tests.support.calls import Call
from tests.support.problems import randn

CALLS: dict[str, Call] = {}
MODULES = {"DirectFeedback": Call(dict(init=0.5, feedback=randn(3, 4)), any_sign=("seed",), dims={"feedback": (3,)})}
