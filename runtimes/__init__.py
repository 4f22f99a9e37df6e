"""Back ends that execute a bundle's graphs, one file or folder per inference library."""

if __name__ != "trol_edge.runtimes":
    raise ImportError(
        "import this folder as trol_edge.runtimes; a second copy under another name would not share its classes"
    )
