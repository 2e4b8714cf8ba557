#!/usr/bin/env python3
"""Gets the peers' Python packages from PyPI into one folder, only the files that are used.

    bench/peers/fetch.py [--into .peers] [lmdeploy humming deepgemm]

For Linux on x86-64 and Python 3.12, whatever runs this. `.peers` is what `bench/gpu_peers.py` looks
for; nothing of it belongs into the repository. Delete the folder to be rid of them.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LMDEPLOY_FILES = (  # what fused_moe_w8a8 imports
    "lmdeploy/pytorch/envs.py",
    "lmdeploy/pytorch/kernels/default/w8a8_kernels.py",
    "lmdeploy/pytorch/kernels/cuda/activation.py",
    "lmdeploy/pytorch/kernels/cuda/utils.py",
    "lmdeploy/pytorch/kernels/cuda/w8a8_triton_kernels.py",
    "lmdeploy/pytorch/kernels/cuda/moe/fused_moe.py",
    "lmdeploy/pytorch/kernels/cuda/moe/w8a8.py",
)
PACKAGES = {  # name -> (requirement, files of the wheel to keep: exact names, or a folder and "/")
    "lmdeploy": ("lmdeploy==0.18.0", LMDEPLOY_FILES),
    "humming": ("humming-kernels==0.1.19", ("humming/",)),
    "deepgemm": ("sgl-deep-gemm==0.1.4", ("deep_gemm/",)),
}
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64"]
PLATFORMS += ["manylinux_2_17_x86_64", "manylinux2014_x86_64"]


def fetch(requirement: str, keep: tuple[str, ...], into: Path) -> int:
    """Downloads one wheel and unpacks what is kept; returns the number of files."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        subprocess.run([*command, "-d", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [
                name
                for name in archive.namelist()
                if any(name == k or (k.endswith("/") and name.startswith(k)) for k in keep)
            ]
            archive.extractall(into, names)
            for name in names:  # zip files keep modes, extractall does not restore them
                mode = archive.getinfo(name).external_attr >> 16
                if mode & 0o111:
                    (into / name).chmod(0o755)
    return len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", default=list(PACKAGES), metavar="PEER")
    parser.add_argument("--into", type=Path, default=Path(".peers"))
    arguments = parser.parse_args()
    for peer in arguments.peers:
        if peer not in PACKAGES:
            parser.error(f"PEER: expected one of {', '.join(PACKAGES)}, got {peer}")
        requirement, keep = PACKAGES[peer]
        count = fetch(requirement, keep, arguments.into)
        print(f"{requirement}: {count} files into {arguments.into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
