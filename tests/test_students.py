"""Networks and students: structure, exactness, seeds, files."""

from __future__ import annotations

import itertools
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flowfast.students import MLP, FlowStudent, ResidualFlowMap, SegmentTable, TransformerFlowMap

TABLE = SegmentTable(r=(0.01, 0.4, 1.5, 10.0), s=(1.0, 0.95, 0.6, 0.1))
KINDS = list(itertools.product([False, True], [False, True]))  # preconditioned, shared


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student(dim: int = 3, *, preconditioned: bool = True, shared: bool = True, **more) -> FlowStudent:
    settings = {"width": 8, "depth": 2, "center": [0.5 * i for i in range(dim)], "scale": 0.7, "seed": 3} | more
    return FlowStudent(dim, TABLE, preconditioned=preconditioned, shared=shared, **settings)


def test_mlp_alternates_relu_and_its_square():
    net = MLP(3, 2, width=5, depth=3, activation="relu-requ", generator=generator())
    x = torch.randn(7, 3, generator=generator(1))
    first, second, third, last = net.layers
    h = torch.relu(first(x))
    h = torch.relu(second(h)) ** 2
    h = torch.relu(third(h))
    assert torch.equal(net(x), last(h))
    plain = MLP(3, 2, width=5, depth=3, generator=generator())
    h = torch.relu(third(torch.relu(second(torch.relu(first(x))))))
    assert torch.equal(plain(x), last(h))  # the same generator, the same weights


def test_mlp_starts_xavier_uniform_with_zero_biases():
    net = MLP(20, 30, width=200, depth=2, generator=generator())
    assert [tuple(layer.weight.shape) for layer in net.layers] == [(200, 20), (200, 200), (30, 200)]
    for layer in net.layers:
        weight = layer.weight.detach()
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()


def test_networks_side_by_side_are_the_networks():
    nets = [MLP(3, 2, width=5, depth=3, activation="relu-requ", generator=generator(i)) for i in range(4)]
    nets += [MLP(3, 2, width=5, depth=3, activation="relu-requ", generator=generator(9))]
    assert nets[0].config == {"dim_in": 3, "dim_out": 2, "width": 5, "depth": 3, "activation": "relu-requ"}
    _check_stacked(nets)
    _check_stacked([TransformerFlowMap(3, blocks=2, width=8, heads=2, generator=generator(i)) for i in range(4)])


def _check_stacked(nets):
    x = torch.randn(len(nets), 7, 3, generator=generator(1))
    stacked = {name: torch.stack([dict(net.named_parameters())[name] for net in nets]) for name in nets[0].state_dict()}
    for i, out in enumerate(nets[0].stacked(stacked, x)):
        torch.testing.assert_close(out, nets[i](x[i]), rtol=1e-5, atol=1e-6)


def test_residual_blocks_are_euler_steps():
    x = torch.randn(7, 3, generator=generator(1))
    net = ResidualFlowMap(3, blocks=2, width=5, generator=generator())
    assert len(net.velocities) == 2 and [layer.weight.shape[0] for layer in net.velocities[0].layers] == [5, 5, 3]
    half = x + net.velocities[0](x) / 2
    torch.testing.assert_close(net(x), half + net.velocities[1](half) / 2)
    shared = ResidualFlowMap(3, blocks=2, width=5, shared=True, generator=generator())
    (velocity,) = shared.velocities
    half = x + velocity(torch.cat([x, torch.ones(7, 1)], 1)) / 2
    torch.testing.assert_close(shared(x), half + velocity(torch.cat([half, torch.full((7, 1), 0.5)], 1)) / 2)


def test_transformer_is_torchs_own_pre_norm_layer():
    """Against nn.TransformerEncoder with the same weights, embedding and head aside."""
    net = TransformerFlowMap(3, blocks=2, width=8, heads=2, generator=generator())
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "norm" in name or "bias" in name:  # so that none of them is idle
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator(len(name))))
    layer = nn.TransformerEncoderLayer(
        8, 2, dim_feedforward=32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    names = {
        "attention_norm": "norm1",
        "queries_keys_values.": "self_attn.in_proj_",
        "attention_out": "self_attn.out_proj",
        "feed_forward_norm": "norm2",
        "expand": "linear1",
        "contract": "linear2",
        "blocks": "layers",
    }
    weights = {name: value for name, value in net.state_dict().items() if name.startswith(("blocks", "norm"))}
    for ours, other in names.items():
        weights = {name.replace(ours, other): value for name, value in weights.items()}
    theirs.load_state_dict(weights)
    x = torch.randn(7, 3, generator=generator(1))
    expected = net.head(theirs(net.embed(x[..., None]) + net.positions))[..., 0]
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


def test_transformer_starts_as_published():
    net = TransformerFlowMap(64, blocks=3, generator=generator())
    assert net.config == {"dim": 64, "blocks": 3, "width": 128, "heads": 4}
    assert float(net.positions.detach().std()) == pytest.approx(0.02, rel=0.05)
    layer = net.blocks[0]["expand"]
    assert layer.weight.shape == (512, 128) and not layer.bias.any()
    bound = math.sqrt(6 / 640)
    assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert sum(weight.numel() for weight in net.parameters()) == 3 * 198_272 + 64 * 128 + 256 + 256 + 129


MAKERS = [
    lambda g: MLP(3, 3, width=4, generator=g),
    lambda g: ResidualFlowMap(3, blocks=2, width=4, generator=g),
    lambda g: TransformerFlowMap(3, blocks=1, width=4, heads=2, generator=g),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_generator_decides_the_bits_of_every_network(make):
    one, same, other, unnamed = make(generator(3)), make(generator(3)), make(generator(4)), make(None)
    for a, b, differ in ((one, same, False), (one, other, True), (one, unnamed, True)):
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        assert any(not torch.equal(x, y) for x, y in pairs) == differ
    for shape in ((3,), (0, 3), (2, 4, 3)):
        assert one(torch.randn(shape, generator=generator())).shape == shape


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 4, 3)])
def test_leading_dimensions_are_free(shape):
    x = torch.randn(shape, generator=generator())
    assert MLP(3, 5, width=4, depth=1, generator=generator())(x).shape == (*shape[:-1], 5)
    assert student()(x).shape == shape


def test_no_call_touches_the_global_generator():
    before = torch.get_rng_state()
    MLP(3, 3)
    MLP(3, 3, generator=generator())
    ResidualFlowMap(3, blocks=1)
    TransformerFlowMap(3, blocks=1, width=8)
    student().trajectory(torch.ones(2, 3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("preconditioned", "shared"), KINDS)
def test_seed_decides_the_bits(preconditioned, shared):
    one, same, other = (student(preconditioned=preconditioned, shared=shared, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert len(one.networks) == (1 if shared else 3)
    if not shared:
        assert not torch.equal(one.networks[0].layers[0].weight, one.networks[1].layers[0].weight)


def test_preconditioned_segment_is_the_stated_formula():
    model, i = student(dtype=torch.float64), 1
    x = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    (r_from, r_to), (s_from, s_to) = TABLE.r[i : i + 2], TABLE.s[i : i + 2]
    y, center, scale = x / s_from, model.center, 0.7
    logs = torch.tensor(TABLE.r, dtype=torch.float64).log()
    levels = ((logs - logs.mean()) / logs.std(correction=0))[i : i + 2].expand(5, 2)
    inputs = torch.cat([(y - r_from * center) / math.sqrt(1 + (r_from * scale) ** 2), levels], 1)
    average = center + scale * model.networks[0](inputs)
    torch.testing.assert_close(model.segment(i, x), s_to * (y + (r_to - r_from) * average), rtol=1e-12, atol=1e-12)


def _axes(dim: int = 3, count: int = 2) -> torch.Tensor:
    square = torch.randn(dim, dim, generator=generator(5), dtype=torch.float64)
    return torch.linalg.qr(square).Q[:, :count]


@pytest.mark.parametrize("shared", [False, True])
def test_along_axes_a_student_is_one_of_fewer_dimensions_and_across_them_exact(shared):
    """The points' coordinates along the axes go through the small student, those across change their scale only."""
    axes, center = _axes(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    more = {"shared": shared, "dtype": torch.float64}
    model = student(center=center, axes=axes, **more)
    small = FlowStudent(2, TABLE, width=8, depth=2, center=axes.mT @ center, scale=0.7, seed=3, **more)
    x = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    across = torch.eye(3, dtype=torch.float64) - axes @ axes.mT
    for i in range(3):
        (r_from, r_to), (s_from, s_to) = TABLE.r[i : i + 2], TABLE.s[i : i + 2]
        kept = s_to * (x / s_from + (r_to - r_from) * center) @ across
        expected = small.segment(i, x @ axes) @ axes.mT + kept
        torch.testing.assert_close(model.segment(i, x), expected, rtol=1e-12, atol=1e-12)
    y = torch.stack([model.segment(i, x) for i in range(3)]).detach()
    assert float(model.losses(x.expand(3, 5, 3), y).detach().max()) < 1e-24


def test_axes_come_back_from_a_file_and_serve_preconditioned_students_only(tmp_path):
    model = student(axes=_axes())
    model.save(tmp_path)
    again = FlowStudent.load(tmp_path)
    x = torch.randn(5, 3, generator=generator())
    assert again.axes.shape == (3, 2) and torch.equal(model(x), again(x))
    assert student(axes=_axes(), preconditioned=False).axes is None


@pytest.mark.parametrize(("dtype", "offset", "bound"), [(torch.float64, 1.0, 1e-14), (torch.float32, 1e4, 1e-6)])
def test_a_single_component_is_exact_whatever_the_network(dtype, offset, bound):
    mean = offset + torch.arange(4, dtype=dtype)
    model = FlowStudent(4, TABLE, width=8, depth=1, center=mean, scale=0.0, dtype=dtype)
    noise = torch.randn(6, 4, generator=generator(), dtype=torch.float64)
    points = [
        s * (r * mean.double() + noise) for r, s in zip(TABLE.r, TABLE.s, strict=True)
    ]  # the flow keeps the noise
    for i, (x, y) in enumerate(zip(points, points[1:], strict=False)):
        out = model.segment(i, x.to(dtype)).detach().double()
        assert float((out - y).norm() / y.norm()) < bound


@pytest.mark.parametrize("shared", [False, True])
def test_a_plain_segment_is_the_network(shared):
    model = student(preconditioned=False, shared=shared)
    x = torch.randn(5, 3, generator=generator())
    network, inputs = model.networks[0 if shared else 2], x
    if shared:
        logs = torch.tensor(TABLE.r, dtype=torch.float64).log()
        levels = ((logs - logs.mean()) / logs.std(correction=0))[2:4].float()
        inputs = torch.cat([x, levels.expand(5, 2)], 1)
    torch.testing.assert_close(model.segment(2, x), network(inputs))


@pytest.mark.parametrize(("preconditioned", "shared"), KINDS)
def test_losses_vanish_exactly_where_the_student_is_right(preconditioned, shared):
    model = student(preconditioned=preconditioned, shared=shared, dtype=torch.float64)
    x = torch.randn(3, 5, 3, generator=generator(), dtype=torch.float64)
    y = torch.stack([model.segment(i, x[i]) for i in range(3)])
    y = y.detach()
    assert float(model.losses(x, y).detach().max()) < 1e-24
    y[1] += 1e-3
    wrong = model.losses(x, y).detach()
    unit = TABLE.s[2] * (TABLE.r[2] - TABLE.r[1]) * 0.7 if preconditioned else 1.0
    assert float(wrong[1]) == pytest.approx((1e-3 / unit) ** 2, rel=1e-6)
    assert float(wrong[0] + wrong[2]) < 1e-24


def test_trajectory_composes_the_segments():
    model = student()
    x = torch.randn(5, 3, generator=generator())
    path = model.trajectory(x)
    assert path.shape == (4, 5, 3)
    assert torch.equal(path[0], x)
    for i in range(3):
        assert torch.equal(path[i + 1], model.segment(i, path[i]))
    assert torch.equal(model(x), path[-1])
    assert model.n_segments == 3


def test_output_dtype_follows_x_and_gradients_reach_it():
    model = student()
    x = torch.randn(5, 3, generator=generator())
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert model(x.double()).dtype == torch.float64
    x.requires_grad_()
    model(x).sum().backward()
    assert bool(x.grad.abs().sum(1).gt(0).all())


@pytest.mark.parametrize(("preconditioned", "shared"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_give_back_the_same_bits(tmp_path, preconditioned, shared, dtype):
    model = student(preconditioned=preconditioned, shared=shared, dtype=dtype, activation="relu-requ")
    model.save(tmp_path / "new" / "student")
    again = FlowStudent.load(tmp_path / "new" / "student")
    x = torch.randn(5, 3, generator=generator(), dtype=dtype)
    assert torch.equal(model.trajectory(x), again.trajectory(x))
    assert (again.segments, again.seed, again.activation) == (TABLE, 3, "relu-requ")
    assert sorted(os.listdir(tmp_path / "new" / "student")) == ["student.json", "student.safetensors"]
    json.loads((tmp_path / "new" / "student" / "student.json").read_text())


def test_a_failed_write_leaves_the_old_student(tmp_path, monkeypatch):
    student(seed=1).save(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        student(seed=2).save(tmp_path)
    assert FlowStudent.load(tmp_path).seed == 1


def _edit(folder, **fields):
    about = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps({**about, **fields}))


def _cut(folder):
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _swap(folder):
    weights = load_file(folder / "student.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "student.safetensors")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "student.json").unlink(), "student.json does not exist"),
        (lambda f: (f / "student.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "student.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
        (lambda f: (f / "student.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: _edit(f, format="other"), "format in .* must be 'flowfast student'; got 'other'"),
        (lambda f: _edit(f, version=99), "version in .* must be 1; got 99"),
        (lambda f: _edit(f, config=None), "config in .* is missing"),
        (lambda f: _edit(f, config={"dim": 3}), "holds no student that this version can build"),
        (lambda f: (f / "student.safetensors").unlink(), "student.safetensors is missing or damaged"),
        (_cut, "student.safetensors is missing or damaged"),
        (_swap, "weights_sha256 in student.json does not match"),
    ],
)
def test_damaged_files_are_refused(tmp_path, harm, says):
    student().save(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=says):
        FlowStudent.load(tmp_path)


def test_files_in_the_wrong_place(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        FlowStudent.load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        student().save(tmp_path / "file")


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: MLP(0, 1), ValueError, "dim_in must be at least 1; got 0"),
        (lambda: MLP(1, 1, width=2.0), TypeError, "width must be an int; got float"),
        (lambda: MLP(1, 1, depth=0), ValueError, "depth must be at least 1"),
        (lambda: MLP(1, 1, activation="gelu"), ValueError, "activation must be one of relu, relu-requ; got 'gelu'"),
        (lambda: ResidualFlowMap(0, blocks=1), ValueError, "dim must be at least 1; got 0"),
        (lambda: ResidualFlowMap(3, blocks=1.0), TypeError, "blocks must be an int; got float"),
        (lambda: TransformerFlowMap(3, blocks=0), ValueError, "blocks must be at least 1"),
        (lambda: TransformerFlowMap(3, blocks=1, width=10), ValueError, "width must be a multiple of heads, 4; got 10"),
        (lambda: TransformerFlowMap(3, blocks=1)(torch.ones(2, 4)), ValueError, r"x must have shape \(..., 3\)"),
        (lambda: SegmentTable(r=(1.0,), s=(1.0,)), ValueError, "r must hold at least two"),
        (lambda: SegmentTable(r=(1.0, 2.0), s=(1.0, math.nan)), ValueError, "s must hold at least two positive finite"),
        (lambda: SegmentTable(r=(1.0, 2.0), s=(1.0, 1.0, 1.0)), ValueError, "one length; got 2 and 3"),
        (lambda: SegmentTable(r=(2.0, 1.0), s=(1.0, 1.0)), ValueError, "r must increase from noise to data"),
        (lambda: student(center=[0.0]), ValueError, "center must hold 3 finite numbers"),
        (lambda: student(scale=-1.0), ValueError, "scale must be finite and at least 0"),
        (lambda: student(axes=torch.eye(2)), ValueError, r"axes must have shape \(3, 1 to 3\); got \(2, 2\)"),
        (lambda: student(axes=torch.ones(3, 1)), ValueError, "axes must be orthonormal columns; .* off by 2.0e"),
        (lambda: student(axes=_axes() * math.nan), ValueError, "axes must be orthonormal columns"),
        (lambda: student(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: student(seed=1.5), TypeError, "seed must be an int"),
        (lambda: student(dtype=torch.float16), TypeError, "dtype must be torch.float32 or torch.float64"),
        (lambda: student().segment(3, torch.ones(1, 3)), ValueError, "i must be a segment from 0 to 2; got 3"),
        (lambda: student()(torch.ones(2, 4)), ValueError, r"x must have shape \(..., 3\); got \(2, 4\)"),
        (lambda: student()(torch.ones(2, 3, dtype=torch.int64)), TypeError, "floating numbers; got torch.int64"),
        (lambda: student()([1.0, 2.0, 3.0]), TypeError, "x must be a tensor of floating numbers; got list"),
        (lambda: student()(torch.ones(2, 3, device="meta")), ValueError, "x is on meta, the student on cpu"),
    ],
)
def test_wrong_calls(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def test_a_student_is_a_module_of_its_weights_alone():
    model = student(shared=False)
    assert isinstance(model, nn.Module)
    weights = sum(p.numel() for p in model.parameters())
    assert weights == 3 * ((3 * 8 + 8) + (8 * 8 + 8) + (8 * 3 + 3))
