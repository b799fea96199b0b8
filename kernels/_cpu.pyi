from collections.abc import Callable, Sequence

from torch import Tensor

class Step:
    tensors: Sequence[Tensor | None]
    def __call__(self) -> None: ...

class Tape:
    def append(self, function: Callable[[], object], /) -> None: ...
    def replay(self) -> None: ...
    def __len__(self) -> int: ...

def record(tape: Tape | None, /) -> None: ...
def recording() -> bool: ...
def product(
    networks: int,
    rows: int,
    depth: int,
    columns: int,
    low: bool,
    a: int,
    a_network: int,
    a_row: int,
    a_column: int,
    b: int,
    b_network: int,
    b_row: int,
    b_column: int,
    bias: int,
    bias_network: int,
    out: int,
    low_out: bool,
    out_network: int,
    out_row: int,
    accumulate: bool,
    /,
) -> Step: ...
def bias_layer_norm_forward(
    low: bool,
    networks: int,
    rows: int,
    width: int,
    bias_stride: int,
    vector_stride: int,
    x: int,
    bias: int,
    weight: int,
    shift: int,
    relu: bool,
    residual: int,
    eps: float,
    y: int,
    mean: int,
    rstd: int,
    /,
) -> Step: ...
def bias_layer_norm_backward(
    low: bool,
    networks: int,
    rows: int,
    width: int,
    bias_stride: int,
    vector_stride: int,
    x: int,
    bias: int,
    weight: int,
    shift: int,
    relu: bool,
    dbias_stride: int,
    grad_stride: int,
    dy: int,
    mean: int,
    rstd: int,
    dx: int,
    dbias: int,
    dweight: int,
    dshift: int,
    /,
) -> Step: ...
def categorical_projection(
    rows: int, atoms: int, probs: int, positions: int, v_max: float, out: int, /
) -> None: ...
def categorical_bellman(
    members: int,
    next_members: int,
    rows: int,
    atoms: int,
    logits: int,
    member_stride: int,
    row_stride: int,
    next_logits: int,
    next_member_stride: int,
    next_row_stride: int,
    rewards: int,
    discounts: int,
    log_probs: int,
    temperature_at: int,
    temperature: float,
    v_max: float,
    scale: float,
    columns: int,
    losses: int,
    grads: int,
    /,
) -> None: ...
def expected_value(
    members: int,
    rows: int,
    atoms: int,
    logits: int,
    member_stride: int,
    row_stride: int,
    atom_values: int,
    scale: float,
    columns: int,
    values: int,
    grads: int,
    /,
) -> None: ...
def tanh_gaussian(
    rows: int,
    actions: int,
    mean: int,
    raw: int,
    mean_stride: int,
    raw_stride: int,
    noise: int,
    out_actions: int,
    out_stride: int,
    out_log_probs: int,
    /,
) -> None: ...
def tanh_gaussian_backward(
    rows: int,
    actions: int,
    dactions: int,
    dactions_stride: int,
    dlog_prob_at: int,
    dlog_prob: float,
    scale: float,
    mean: int,
    raw: int,
    mean_stride: int,
    raw_stride: int,
    noise: int,
    dmean: int,
    draw: int,
    dmean_stride: int,
    draw_stride: int,
    /,
) -> None: ...
def adamw(
    count: int,
    param: int,
    low_grad: bool,
    grad: int,
    exp_avg: int,
    exp_avg_sq: int,
    target: int,
    low: int,
    target_low: int,
    step: int,
    learning_rate_at: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    tau_at: int,
    tau: float,
    grad_scale: float,
    norm: int,
    /,
) -> None: ...
def multiplies(low: bool, /) -> bool: ...
def pack_inputs(
    rows: int,
    observations: int,
    observation_width: int,
    observation_stride: int,
    actions: int,
    action_width: int,
    action_stride: int,
    table: int,
    tasks: int,
    embedding_width: int,
    ids: int,
    l1: bool,
    low: bool,
    out: int,
    width: int,
    /,
) -> None: ...
def embedding_gradient(
    members: int,
    rows: int,
    grad: int,
    member_stride: int,
    row_stride: int,
    table: int,
    tasks: int,
    width: int,
    ids: int,
    l1: bool,
    low: bool,
    out: int,
    /,
) -> None: ...
def round_all(count: int, x: int, out: int, /) -> None: ...
def set_threads(count: int, /) -> None: ...
def sum_of_squares(count: int, x: int, /) -> float: ...
def sum_rows(
    low: bool, networks: int, rows: int, width: int, x: int, out: int, out_stride: int, /
) -> None: ...
def update_summary(
    rows: int,
    losses_count: int,
    values_count: int,
    losses: int,
    log_probs: int,
    q_values: int,
    target_entropy: float,
    alpha: int,
    step: int,
    metrics: int,
    gradient: int,
    since: int,
    /,
) -> None: ...
