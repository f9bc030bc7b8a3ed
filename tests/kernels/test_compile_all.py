"""Every Triton kernel gets past the compiler for an H100, not only through the interpreter."""

import ast
import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def launched_functions() -> set[str]:
    """module.function of each first argument of launch(), or of what is launched by kernel[grid]."""
    found = set()
    for path in KERNELS.rglob("*.py"):
        if "hopper" in path.name:
            continue
        tree = ast.parse(path.read_text())
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        module = ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            kernel = None
            if getattr(call.func, "id", None) == "launch":
                kernel = call.args[0]
            elif isinstance(call.func, ast.Subscript):
                kernel = call.func.value
            if getattr(kernel, "id", None) in own:
                found.add(f"{module}.{kernel.id}")
    return found


def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched = launched_functions()
    assert "kernels.nsa.block_logsumexp_triton._logsumexp_kernel" in launched and len(launched) > 30
    assert launched <= set(done.stdout.split())
