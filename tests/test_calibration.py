"""Calibrated formats from the file to the sum: in one process, on ranks, and in a model."""

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
from flashcomm.calibration import Calibration, MovingReach
from flashcomm.codecs import Features, Keep, parse
from flashcomm.demo import MODEL


def outliers(rank: int, cols: int = 256, tokens: int = 40) -> torch.Tensor:
    """Partial sums with four features that are always large, like those of large models."""
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(rank))
    x[:, [3, 77, 130, 255]] *= 50
    return x


def features(num_ranks: int, cols: int = 256) -> Features:
    parts = [outliers(r, cols) for r in range(num_ranks)]
    return Features(torch.stack([x.abs().amax(0) for x in (*parts, sum(parts))]))


def test_the_worst_features_are_those_that_reach_furthest_over_all_ranks():
    assert features(3).worst(4) == (3, 77, 130, 255)
    assert Features(torch.ones(3, 5)).worst(2) == (0, 1)
    assert isinstance(parse("int4+keep64").bind(features(2), 0), Keep)
    assert parse("int4+keep64").bind(features(2), 0).kept == (3, 77, 130, 255)


def test_moving_averages_are_those_of_the_paper():
    reach = MovingReach()
    batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    low, high = batches[0].amin(0), batches[0].amax(0)
    for batch in batches:
        reach.add(batch)
    for batch in batches[1:]:
        low, high = 0.99 * low + 0.01 * batch.amin(0), 0.99 * high + 0.01 * batch.amax(0)
    assert torch.allclose(reach.result(), torch.maximum(low.abs(), high.abs()))


def test_sizes_are_the_papers():
    codec = parse("int4static+keep64")
    assert codec.payload_bytes(4096) == 4032 // 2 + 1 + 2 * 64
    assert codec.bits_per_value(4096) == pytest.approx(4 + 12 / 64, abs=2e-3)
    assert parse("int4g128+keep64").bits_per_value(8192) < 4.45


def test_kept_features_help_where_there_are_outliers():
    x = outliers(1)

    def error(spec):
        codec = parse(spec).bind(features(2), 1)
        return (codec.decode(codec.encode(x), 256, torch.float32) - x).square().mean()

    assert error("int4g128+keep64") < error("int4g128") / 20
    assert error("int4static+keep64") < error("int4static") / 20


def test_static_scales_are_per_rank_and_a_payload_says_whose():
    codec = parse("int4static")
    known = Features(torch.tensor([[7.0, 7.0], [14.0, 7.0], [21.0, 14.0]]))
    x = torch.tensor([[7.0, -7.0]])
    for rank, scale in ((0, 1.0), (1, 2.0), (2, 3.0)):
        mine = codec.bind(known, rank)
        payload = mine.encode(x)
        assert payload[0, -1] == rank
        assert mine.step(x)[0, 0] == scale
        assert torch.equal(
            codec.bind(known, 0).decode(payload, 2, torch.float32), mine.decode(payload, 2, torch.float32)
        )
    assert codec.bind(known, 1).formats[1].table == 2
    beyond = torch.tensor([[10.0, float("nan")]])
    mine = codec.bind(known, 0)
    decoded = mine.decode(mine.encode(beyond), 2, torch.float32)
    assert decoded[0, 0] == 7
    assert decoded[0, 1].isnan()
    assert mine.step(beyond)[0, 0] == 6


def test_a_file_brings_back_what_was_saved(tmp_path):
    path = tmp_path / "m.calibration"
    Calibration({"a.b": features(2), "c": features(2, 260)}, "some text").save(path)
    loaded = Calibration.load(path)
    assert loaded.origin == "some text"
    assert loaded.features["c"].reach.shape == (3, 260)
    assert path.stat().st_size < 3 * (256 + 260) * 2 + 600
    bound = loaded.bind("int4static+keep64", "a.b", rank=1, ranks=2)
    assert bound.base.table == 1
    assert loaded.bind("int4g128", "unknown", rank=0, ranks=7) == parse("int4g128")


def test_wrong_use_says_what_to_do(tmp_path):
    x = torch.zeros(2, 256)
    for spec in ("int4+keep64", "int4static", "int8:int4+keep64"):
        with pytest.raises(ValueError, match="flashcomm calibrate MODEL"):
            parse(spec).check(256)
    with pytest.raises(ValueError, match="flashcomm calibrate MODEL"):
        flashcomm.encode(x, "int4+keep64")
    with pytest.raises(ValueError, match="calibrated for a sum of 256 features, not of 100"):
        flashcomm.encode(x[:, :100], parse("int4static").bind(features(2), 0))
    calibration = Calibration({"a": features(2)})
    with pytest.raises(ValueError, match="calibration is of 2 ranks and the group has 4.*--tp 4"):
        calibration.bind("int4static", "a", rank=0, ranks=4)
    with pytest.raises(ValueError, match="module 'b' was not calibrated. Calibrated: a"):
        calibration.bind("int4static", "b", rank=0, ranks=2)
    with pytest.raises(ValueError, match="cannot read the calibration"):
        Calibration.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="cannot read the calibration"):
        Calibration.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(tmp_path / "other")
    with pytest.raises(ValueError, match="2 to 8 bits"):
        parse("int4static").__class__(1)
    with pytest.raises(ValueError, match="so rank 3 has no scales"):
        parse("int4static").bind(features(2), 3)
    for group in (2, 4):
        parse("int4static+keep64").bind(features(group), 0).check(256, group)
        with pytest.raises(ValueError, match=f"calibrated on {group} ranks, and the group has 3: run.*--tp 3"):
            parse("int4static+keep64").bind(features(group), 0).check(256, 3)
    with pytest.raises(ValueError, match="row 1, feature 0 has nan"):
        Features(torch.tensor([[1.0], [float("nan")]]))


def sums(spec: str, algorithm: str) -> tuple[torch.Tensor, torch.Tensor]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    known = features(num_ranks)
    got = flashcomm.all_reduce(outliers(rank), parse(spec).bind(known, rank), algorithm=algorithm)
    xs = [outliers(r) for r in range(num_ranks)]
    return got, flashcomm.simulate.all_reduce(xs, parse(spec).bind(known, 0), algorithm)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("algorithm", ["one_step", "two_step"])
@pytest.mark.parametrize("spec", ["int4g128+keep64", "int4static+keep64", "int2g32+spike+keep64", "int8static"])
def test_ranks_agree_and_one_process_predicts_them(spec, algorithm, world_size):
    results = ranks.shared(world_size).run(sums, spec, algorithm)
    exact = sum(outliers(r) for r in range(world_size))
    for got, predicted in results:
        assert promises.same(got, results[0][0])
        assert promises.same(got, predicted)
        assert (got - exact).norm() / exact.norm() < 0.15


def test_a_broken_payload_stays_in_its_row():
    codec = parse("int2g256+spike")
    payload = codec.encode(torch.randn(1, 16))
    payload[:, -2:] = 255
    target = torch.zeros(64, 16)
    flashcomm.decode(payload, codec, cols=16, dtype=torch.float32, out=target[:1])
    assert not target[1:].any()
    assert promises.same(target[:1], codec.decode(payload, 16, torch.float32))
    static = parse("int4static").bind(features(2), 0)
    payload = static.encode(torch.randn(1, 256))
    payload[:, -1] = 9
    decoded = flashcomm.decode(payload, static, cols=256, dtype=torch.float32)
    assert promises.same(decoded, static.decode(payload, 256, torch.float32))


def test_wrappers_pass_on_what_distinguishes_their_base():
    from flashcomm.codecs import Affine, Hadamard

    class Table(Affine):
        @property
        def identity(self):
            return "table@7"

        def check(self, cols, ranks=None):
            raise ValueError("only so many columns")

    base = Table(4, False, 32)
    assert Hadamard(base).identity == "table@7+hadamard"
    assert Keep(base, 64).identity == "table@7+keep64"
    assert flashcomm.kernels.route(base, "cpu")[0] == "torch"
    with pytest.raises(ValueError, match="only so many"):
        Hadamard(base, adaptive=True).check(33)


def unbound(spec: str):
    for algorithm in ("one_step", "two_step"):
        with pytest.raises(ValueError, match="needs to know the features"):
            flashcomm.all_reduce(torch.zeros(4, 256), spec, algorithm=algorithm)
    differing = parse("int4static").bind(Features(torch.full((3, 256), 1.0 + dist.get_rank())), dist.get_rank())
    with pytest.raises(RuntimeError, match="ranks disagree about this collective.*int4static@"):
        flashcomm.all_reduce(torch.zeros(4, 256), differing, algorithm="one_step")


def test_an_unbound_codec_and_different_files_are_refused_on_every_rank():
    ranks.shared(2).run(unbound, "int4+keep64")


def model_with_calibration(folder: str):
    from pathlib import Path

    from flashcomm.integrations.transformers import calibrate, compress, compressed
    from flashcomm.models import text
    from flashcomm.models.load import load

    model, tokenizer = load(MODEL, torch.bfloat16)
    windows = text.calibration_windows(tokenizer, tokens=2048)
    with pytest.raises(ValueError, match="flashcomm calibrate MODEL"):
        compress(model, "int4+keep64")
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    calibration = calibrate(model, windows)
    path = Path(folder) / f"{dist.get_rank()}.calibration"
    calibration.save(path)
    with torch.inference_mode():
        plain = model(windows[0][None]).logits
        errors = {}
        for spec in ("int4g128", "int4g128+keep64", "int4static+keep64"):
            with compressed(model, spec, calibration=path, algorithm="one_step") as handle:
                errors[spec] = (model(windows[0][None]).logits - plain).float().norm().item()
                assert sum(handle.calls.values()) == 17
    shapes = {name: list(known.reach.shape) for name, known in calibration.features.items()}
    return shapes, errors, path.read_bytes()


@pytest.mark.thorough
def test_a_model_is_calibrated_and_compressed(tmp_path):
    results = ranks.shared(2).run(model_with_calibration, str(tmp_path))
    shapes, errors, _ = results[0]
    assert len(shapes) == 17
    assert set(map(tuple, shapes.values())) == {(3, 256)}
    assert results[0][2] == results[1][2]
    assert errors["int4g128+keep64"] < errors["int4g128"]
    assert errors["int4static+keep64"] > 0
