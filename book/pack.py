"""Binaries as scripts: from disk a browser runs those, while it refuses to fetch files or to import modules.

A script `NAME.js` says `(window.tpbookFiles ??= {})["NAME"] = "…"`: base64 of the gzip of the bytes, which
`book/static/compute.js` loads and unpacks when a reader asks.
"""

import base64
import gzip
import importlib.metadata
import json
import shutil

import onnx

from tpbook.exporting import split


def write(folder, name, value):
    """`value`, bytes or anything JSON can say, as the script `folder/name.js`."""
    if isinstance(value, bytes):
        value = base64.b64encode(gzip.compress(value, mtime=0)).decode()
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"(window.tpbookFiles ??= {{}})[{json.dumps(name)}] = {json.dumps(value)};\n")


def runtime(package, folder):
    """ONNX Runtime's build for one CPU thread, from the npm package, as `folder/onnxruntime/{ort,wasm}.js`.

    Its licence and those of its parts come from the Python package of the same sources; the npm package has none.
    """
    write(folder, "onnxruntime/ort", (package / "dist/ort.wasm.bundle.min.mjs").read_bytes())
    write(folder, "onnxruntime/wasm", (package / "dist/ort-wasm-simd-threaded.wasm").read_bytes())
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        source = importlib.metadata.distribution("onnxruntime").locate_file(f"onnxruntime/{name}")
        shutil.copyfile(source, folder / "onnxruntime" / name)


def models(paths, folder):
    """Exported models as `folder/models/STEM.graph.js`, and weights that several share once, as `STEM.weights.js`.

    `folder/models/index.js` says of each stem which weights it needs and what `tpbook.export` noted about it.

    Args:
        paths: .onnx files written by `tpbook.export`.
        folder: where the site's scripts are.
    """
    index, first = {}, {}
    for path in sorted(paths):
        graph, weights = split(path)
        if weights not in first:
            first[weights] = path.stem
            write(folder, f"models/{path.stem}.weights", weights)
        write(folder, f"models/{path.stem}.graph", graph)
        notes = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        index[path.stem] = {"weights": first[weights], "about": json.loads(notes["tpbook"])}
    write(folder, "models/index", index)
