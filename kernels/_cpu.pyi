def bias_layer_norm_forward(
    networks: int,
    batch: int,
    width: int,
    x: int,
    bias: int,
    weight: int,
    shift: int,
    residual: int,
    relu: bool,
    eps: float,
    y: int,
    mean: int,
    rstd: int,
    /,
) -> None: ...
def bias_layer_norm_backward(
    networks: int,
    batch: int,
    width: int,
    dy: int,
    y: int,
    x: int,
    bias: int,
    weight: int,
    mean: int,
    rstd: int,
    dx: int,
    dbias: int,
    dweight: int,
    dshift: int,
    /,
) -> None: ...
def categorical_projection(
    rows: int, atoms: int, probs: int, positions: int, v_max: float, out: int, /
) -> None: ...
