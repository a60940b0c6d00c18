"""An ONNX file taken apart: its large tensors as halves, and apart from its graph.

Chapter: :doc:`/book/explorer`
"""

import numpy as np

LARGE = 1024  # bytes from which a tensor counts as weights in `split`; float16 stores those as halves


def split(path):
    """An exported file as two byte strings, so that pages with several models load shared weights once.

    Either order of concatenation is the model again, as protobuf merges messages: ``graph + weights``. `weights` holds
    the tensors of at least 1,024 bytes, by name, and nothing else, so it is the same for every method without
    predictors on the same backbone.

    Args:
        path: a file that `export` wrote.

    Returns:
        (graph, weights): bytes, a `ModelProto` each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no ONNX model.
        ImportError: onnx is not installed.
    """
    onnx = load_onnx()
    try:
        proto = onnx.load(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf's DecodeError
        raise ValueError(f"{path} is damaged or no ONNX model: {error}") from error
    large = sorted((t for t in proto.graph.initializer if len(t.raw_data) >= LARGE), key=lambda t: t.name)
    small = [t for t in proto.graph.initializer if len(t.raw_data) < LARGE]
    weights = onnx.ModelProto(graph=onnx.GraphProto(initializer=large)).SerializeToString()
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    return proto.SerializeToString(), weights


def halve(graph):
    """Store the large float32 tensors of a graph as float16, a Cast behind each.

    Raises:
        ValueError: a tensor holds values that float16 has not.
    """
    onnx, casts = load_onnx(), []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < LARGE:
            continue
        with np.errstate(over="ignore"):
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"weights='float16' cannot hold {tensor.name}, which has values beyond 65504")
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [f"{tensor.name}.float"], to=onnx.TensorProto.FLOAT))
    single = {cast.input[0]: cast.output[0] for cast in casts}
    for node in graph.node:
        node.input[:] = [single.get(name, name) for name in node.input]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def settle(graph):
    """A constant that is reshaped becomes a constant: so torch's exporter writes the K of a TopK that is one."""
    onnx, before = load_onnx(), _read(graph)
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.op_type == "Reshape" and constants.keys() >= set(node.input):
            value, shape = (onnx.numpy_helper.to_array(constants[name]) for name in node.input)
            tensor = onnx.numpy_helper.from_array(value.reshape(shape))
            node.CopyFrom(onnx.helper.make_node("Constant", [], node.output, name=node.name, value=tensor))
    idle = before - _read(graph)
    nodes = [node for node in graph.node if idle.isdisjoint(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)


def _read(graph):
    """Names of what the nodes of a graph read, those of graphs inside it too."""
    inside = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return {name for node in graph.node for name in node.input}.union(*map(_read, inside))


def load_onnx():
    """The package `onnx`, or an ImportError that says where it comes from."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError("exporting needs onnx: pip install tpbook[export]") from error
    return onnx
