"""The page's JavaScript is what its comments say: TypeScript checks the types in them, strictly."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from support import npm

from fbiedge.web.site import PAGE

SOURCE = Path(__file__).resolve().parents[1] / "support" / "page_types"
_ORT = "onnxruntime-common/dist/esm/index.d.ts"
LIBRARIES = {
    "/lib/jinja.js": "@huggingface/jinja/dist/index.d.ts",
    "/lib/tokenizers.js": "@huggingface/tokenizers/types/index.d.ts",
    "/lib/ort.wasm.min.mjs": _ORT,
    "/lib/ort.webgpu.min.mjs": _ORT,
    "onnxruntime-web": _ORT,
}


def test_types(tmp_path: Path) -> None:
    packages = npm.installed(SOURCE) / "node_modules"
    options = {
        "target": "es2023", "module": "esnext", "moduleResolution": "bundler", "lib": ["es2023", "dom", "dom.iterable", "webworker"],
        "types": [], "allowJs": True, "checkJs": True, "strict": True, "noEmit": True, "skipLibCheck": True, "noUnusedLocals": True,
        "noImplicitReturns": True, "paths": {name: [str(packages / path)] for name, path in LIBRARIES.items()},
    }  # fmt: skip
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "include": [f"{PAGE}/*.js"]}))
    command = [str(packages / ".bin" / "tsc"), "--project", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
