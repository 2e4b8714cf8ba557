"""Finds the package in the source tree unless another one was named, and says what it tests."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "data" / "tiny-qwen3-moe"
sys.path.insert(0, str(Path(__file__).parent))

build = os.environ.get("OCTOMOE_BUILD_DIR")
if build and "OCTOMOE_PYTHON_LIBRARY" not in os.environ:
    os.environ["OCTOMOE_PYTHON_LIBRARY"] = str(Path(build) / "python" / "_octomoe.so")
if "OCTOMOE_TEST_INSTALLED" not in os.environ:
    sys.path.insert(0, str(ROOT / "python"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small tensors PyTorch's threads only spin

pytest.importorskip("numpy", reason="NumPy is missing")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is missing")
pytest.importorskip("hypothesis", reason="Hypothesis is missing")

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "octomoe",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("octomoe")


def pytest_report_header() -> str:
    import octomoe

    return f"octomoe {octomoe.__version__} from {octomoe.doctor()['library']}"


@pytest.fixture(scope="session")
def checkpoint_path() -> Path:
    if not (CHECKPOINT / "config.json").exists():
        pytest.skip(f"no checkpoint in {CHECKPOINT}")
    return CHECKPOINT
