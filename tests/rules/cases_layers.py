"""The sweep's table, continued: layers, losses, attention, recurrent cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rules.cases import B3, BOTH, IMG, MASK, SEQ, P, U, X, Y, case, given, rand, real

ALL = (0, 1, 2)
VOL = real(2, 4, 3, 4, 3)
C4 = (real(4), real(4))

# -- convolution, pooling, resampling -------------------------------------------------------------------------------
for _n, _x, _w in ((1, SEQ, real(6, 2, 3)), (2, IMG, real(6, 2, 3, 2)), (3, VOL, real(6, 2, 2, 2, 2))):
    _conv, _back = getattr(F, f"conv{_n}d"), getattr(F, f"conv_transpose{_n}d")
    _f = lambda x, w, b, c=_conv: c(x, w, b, stride=2, padding=1, groups=2)
    case(f"F.conv{_n}d", _f, _x, _w, real(6))
    case(f"F.conv{_n}d(weight)", _f, _x, _w, real(6), duals=(1,))
    case(f"F.conv{_n}d(all, unbatched)", _f, _x[0], _w, real(6), duals=ALL)
    _f = lambda x, w, b, c=_back: c(x, w, b, stride=2, padding=1, groups=2)
    case(f"F.conv_transpose{_n}d", _f, _x, real(4, 3, *_w.shape[2:]), real(6), duals=BOTH)
    _pools = {"avg_pool": (2,), "adaptive_avg_pool": (2,), "max_pool": (2, 1), "adaptive_max_pool": (2,)}
    for _name, _args in _pools.items():
        _pool = getattr(F, f"{_name}{_n}d")
        _at = 4 * _x if "max" in _name else _x  # far apart: a step of a difference must not change the place
        case(f"F.{_name}{_n}d", lambda x, p=_pool, a=_args: p(x, *a), _at)
        case(f"F.{_name}{_n}d(unbatched)", lambda x, p=_pool, a=_args: p(x, *a), _at[0])
    _pool = getattr(F, f"adaptive_max_pool{_n}d_with_indices")
    case(f"F.adaptive_max_pool{_n}d_with_indices", lambda x, p=_pool: p(x, 2), _x)
    case(f"F.lp_pool{_n}d", given(getattr(F, f"lp_pool{_n}d"), 2.0, 2), _x.abs())
    _pool, _unpool = getattr(F, f"max_pool{_n}d"), getattr(F, f"max_unpool{_n}d")
    _size = (_x.shape[2:],)
    case(
        f"F.max_unpool{_n}d",
        lambda x, p=_pool, u=_unpool, s=_size: u(*p(x, 2, return_indices=True), 2, output_size=s[0]),
        _x,
    )
case(
    "F.conv1d(same)", lambda x, w: F.conv1d(x, w, padding="same", dilation=2), SEQ, real(6, 4, 3), duals=BOTH
)
for _mode in ("nearest", "nearest-exact", "area", "bilinear", "bicubic"):
    case(f"F.interpolate({_mode})", lambda x, m=_mode: F.interpolate(x, scale_factor=1.5, mode=m), IMG)
case("F.interpolate(linear)", lambda x: F.interpolate(x, size=5, mode="linear", align_corners=True), SEQ)
case("F.pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMG)
case("F.pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), IMG[0])
case("channel_shuffle", lambda x: torch.channel_shuffle(x, 2), IMG, up=False)
case("F.unfold", lambda x: F.unfold(x, (2, 3), padding=1), IMG)
case("im2col", lambda x: torch._C._nn.im2col(x, (2, 3), (1, 1), (1, 1), (1, 1)), IMG)
case(
    "col2im",
    lambda x: torch._C._nn.col2im(x, (3, 3), (2, 2), (1, 1), (0, 0), (1, 1)),
    SEQ[..., :4].contiguous(),
)
case("F.fold", lambda x: F.fold(x, (3, 3), (2, 2)), SEQ[..., :4].contiguous())
# places between the pixels of IMG, far from their centres, where bilinear weights have kinks
PLACES = torch.tensor([0.3, 1.6, 2.4, 4.3, 3.7, 1.4, 2.65, 0.7, 4.6, 3.35, 1.7, 0.4], dtype=torch.float64)
GRID = torch.stack([(2 * PLACES + 1) / 6 - 1, (PLACES.flip(0) + 1) / 4 - 1], -1).reshape(2, 2, 3, 2)
case("F.affine_grid", lambda x: F.affine_grid(x, [2, 1, 3, 2], align_corners=False), real(2, 2, 3))
case(
    "F.grid_sample",
    lambda x, g: F.grid_sample(x, g, align_corners=False),
    IMG,
    GRID,
    up=False,
)
case("F.local_response_norm", lambda x: F.local_response_norm(x, 3), IMG)

# -- normalisation --------------------------------------------------------------------------------------------------
MEAN, VAR = real(4), rand(4)
case("F.layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), B3, *C4, up=False)
case("F.layer_norm(two axes)", lambda x, w: F.layer_norm(x, (3, 4), w), B3, X, up=False)
case("F.layer_norm(Dual weights)", lambda x, w, b: F.layer_norm(x, (4,), w, b), B3, *C4, duals=ALL, up=False)
case("torch.layer_norm", lambda x, w: torch.layer_norm(x, (4,), w, None, 1e-3), B3, C4[0], up=False)
case("F.rms_norm", lambda x, w: F.rms_norm(x, (4,), w), B3, C4[0])
case("F.rms_norm(Dual weight)", lambda x, w: F.rms_norm(x, (4,), w, 1e-3), B3, C4[0], duals=BOTH)
case("F.group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), IMG, *C4, up=False)
case("F.instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), SEQ, *C4, up=False)
case(
    "F.instance_norm(statistics)",
    lambda x, w: F.instance_norm(x, MEAN, VAR, w, None, False),
    SEQ,
    C4[0],
    up=False,
)
case("F.batch_norm(train)", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), IMG, *C4, up=False)
case(
    "F.batch_norm(train, 2-D)",
    lambda x, w: F.batch_norm(x, None, None, w, None, True),
    X,
    C4[0],
    duals=BOTH,
    up=False,
)
case("F.batch_norm(eval)", lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b), IMG, *C4, up=False)

# -- losses ---------------------------------------------------------------------------------------------------------
CLS, SIGN, CW = torch.tensor([1, -100, 3]), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64), rand(4)
PIX = torch.tensor([[1, 0, 3, 2, 0, -100, 1], [3, 3, 1, -100, 2, 0, 0]])
_w = CW.clone()
for _r in ("mean", "sum", "none"):
    case(f"F.cross_entropy({_r})", lambda x, r=_r: F.cross_entropy(x, CLS, reduction=r), X)
    case(
        f"F.cross_entropy({_r}, smooth)",
        lambda x, r=_r: F.cross_entropy(x, CLS, reduction=r, label_smoothing=0.1),
        X,
    )
    case(f"F.mse_loss({_r})", lambda x, y, r=_r: F.mse_loss(x, y, reduction=r), X, Y, duals=BOTH)
_weight = CW.float().double().tolist()
_plain = lambda: torch.tensor(_weight, dtype=torch.float64)  # weights must not require gradients
case("F.cross_entropy(weight)", lambda x: F.cross_entropy(x, CLS, _plain(), label_smoothing=0.1), X)
case(
    "F.cross_entropy(weight, none)",
    lambda x: F.cross_entropy(x, PIX, _plain(), label_smoothing=0.1, reduction="none"),
    SEQ,
)
case("F.cross_entropy(ignore)", lambda x: F.cross_entropy(x, torch.tensor([2, 1, 0]), ignore_index=2), X)
case("F.cross_entropy(unbatched)", lambda x: F.cross_entropy(x[0], torch.tensor(2)), X)
case(
    "F.cross_entropy(probabilities)",
    lambda x, y: F.cross_entropy(x, y, _plain(), label_smoothing=0.1),
    X,
    Y.softmax(1),
    duals=BOTH,
)
if hasattr(F, "linear_cross_entropy"):
    case(
        "F.linear_cross_entropy",
        lambda x, w: F.linear_cross_entropy(x, w, CLS),
        X,
        torch.cat([Y, P]),
        duals=BOTH,
    )
case("cross_entropy_loss", lambda x: torch._C._nn.cross_entropy_loss(x, CLS, None, 1), X)
case("F.nll_loss", lambda x: F.nll_loss(x, PIX, _plain()), SEQ)
case("F.l1_loss", F.l1_loss, X, Y, duals=BOTH)
case("F.smooth_l1_loss", lambda x, y: F.smooth_l1_loss(x, y, beta=0.7), X, Y, duals=BOTH)
case("smooth_l1_loss(beta 0)", lambda x, y: torch._C._nn.smooth_l1_loss(x, y, 1, 0.0), X, Y, duals=BOTH)
case("F.huber_loss", lambda x, y: F.huber_loss(x, y, delta=0.7), X, Y, duals=BOTH)
case("F.kl_div", lambda x, y: F.kl_div(x, y, reduction="batchmean"), X, U, duals=BOTH)
case("F.kl_div(log)", lambda x, y: F.kl_div(x, y, reduction="none", log_target=True), X, Y, duals=BOTH)
case(
    "F.binary_cross_entropy",
    lambda x, y, w: F.binary_cross_entropy(x, y, w),
    U,
    rand(3, 4),
    rand(3, 4),
    up=False,
)
case("F.binary_cross_entropy(Dual target)", F.binary_cross_entropy, U, rand(3, 4), duals=BOTH, up=False)
case(
    "F.binary_cross_entropy_with_logits",
    lambda x, y: F.binary_cross_entropy_with_logits(x, y, pos_weight=_plain()),
    X,
    U,
    duals=BOTH,
)
case("F.poisson_nll_loss", F.poisson_nll_loss, X, U)
case("F.gaussian_nll_loss", F.gaussian_nll_loss, X, Y, P, duals=ALL)
case("F.soft_margin_loss", lambda x: F.soft_margin_loss(x, Y.sign()), X)
case("F.hinge_embedding_loss", lambda x: F.hinge_embedding_loss(x, Y.sign()), X)
case(
    "F.margin_ranking_loss", lambda x, y: F.margin_ranking_loss(x[:, 0], y[:, 0], SIGN, 0.1), X, Y, duals=BOTH
)
case("F.cosine_embedding_loss", lambda x, y: F.cosine_embedding_loss(x, y, SIGN), X, Y, duals=BOTH)
case("F.triplet_margin_loss", lambda x, y: F.triplet_margin_loss(x, y, U, 1.0), X, Y, duals=BOTH)
case(
    "F.triplet_margin_with_distance_loss",
    lambda x, y: F.triplet_margin_with_distance_loss(x, y, U),
    X,
    Y,
    duals=BOTH,
)
case("F.multilabel_soft_margin_loss", lambda x: F.multilabel_soft_margin_loss(x, MASK.double()), X)


# -- dropout: the same seed, hence the same mask, for every evaluation ----------------------------------------------
def seeded(function):
    def call(*args):
        torch.manual_seed(3)
        return function(*args)

    return call


for _name in "dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split():
    _d = {"dropout1d": SEQ, "dropout3d": VOL}.get(_name, IMG)
    _in_place = seeded(given(getattr(F, _name), 0.4, True, True))
    case("F." + _name, seeded(given(getattr(F, _name), 0.4, True)), _d)
    case(f"F.{_name}(inplace)", lambda x, f=_in_place: f(x * 1), _d)
case("native_dropout", seeded(lambda x: torch.native_dropout(x, 0.4, True)[0]), X)
case("torch.dropout", seeded(lambda x: torch.dropout(x, 0.4, True)), X)
case("F.gumbel_softmax", seeded(lambda x: F.gumbel_softmax(x, tau=0.7)), X)
case("F.rrelu(training)", seeded(lambda x: F.rrelu(x, 0.1, 0.5, training=True)), X)

# -- recurrent cells ------------------------------------------------------------------------------------------------
_cell = (real(8, 4), real(8, 2), real(8), real(8))
case(
    "lstm_cell",
    lambda x, h, c, *w: torch.lstm_cell(x, (h, c), *w),
    X,
    real(3, 2),
    real(3, 2),
    *_cell,
    duals=ALL,
)
_cell = (real(6, 4), real(6, 2), real(6), real(6))
case("gru_cell", torch.gru_cell, X, real(3, 2), *_cell, duals=BOTH)
_cell = (real(2, 4), real(2, 2), real(2), real(2))
case("rnn_tanh_cell", torch.rnn_tanh_cell, X, real(3, 2), *_cell, duals=BOTH)
case(
    "rnn_relu_cell", torch.rnn_relu_cell, X, rand(3, 2), _cell[0], rand(2, 2), rand(2, low=2, high=3), rand(2)
)
