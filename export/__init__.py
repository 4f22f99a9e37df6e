"""Makes ONNX graphs and a bundle from a checkpoint, on a workstation. Needs `pip install trol-edge[export]`."""

if __name__ != "trol_edge.export":
    raise ImportError(
        "import this folder as trol_edge.export; a second copy under another name would not share its classes"
    )
