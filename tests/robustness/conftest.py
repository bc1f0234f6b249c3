"""The bench of the verifier's tests serves these, too."""

from tests.verify.conftest import bench, pytest_collection_modifyitems  # noqa: F401
