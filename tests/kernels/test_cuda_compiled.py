"""The CUDA C++ kernels as machine code for six GPUs: registers, spills, widths of accesses, instructions per value."""

import ctypes
import functools
import os
import subprocess

import pytest
import torch

from flashcomm import codecs, kernels
from flashcomm.kernels import routes
from thorough import thorough

pytest.importorskip("triton")
import cuda_on_cpu
from flashcomm.bench import sass
from flashcomm.kernels.gpu import cuda
from flashcomm.kernels.gpu.cuda import compiler, driver, launch

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

MOST = {
    # Instructions per value: encode, decode, decode_sum_encode of 4 payloads. Two per cent more than what was counted.
    "int8g128": (11.6, 12.3, 30.9),
    "int4g128": (11.8, 12.7, 32.3),
    "int4g32": (14.7, 13.0, 37.3),
    "mxfp4": (20.8, 15.1, 52.3),
    "mxfp8_e4m3": (19.8, 13.7, 46.0),
    "fp8g128": (19.0, 13.2, 43.4),
    "int4g128+hadamard": (23.1, 22.4, 80.0),
}
VERBS = ("encode", "decode", "decode_sum_encode")
EVERYWHERE = [
    ("int8g128", "encode"),
    ("int4g128", "decode"),
    ("int4g32", "decode_sum_encode"),
    ("mxfp4", "decode"),
    ("fp8g128", "encode"),
]
CASES = [
    (spec, verb, target) if target in ("sm_80", "sm_90", "sm_120") else thorough(spec, verb, target)
    for spec, verb in EVERYWHERE
    for target in TARGETS
]
CASES += [(spec, verb, "sm_90") for spec in MOST for verb in VERBS if (spec, verb) not in EVERYWHERE]

needs_nvrtc = pytest.mark.skipif(compiler.find() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Compiled here and now, and found again within this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@needs_nvrtc
@pytest.mark.parametrize(("spec", "verb", "target"), CASES)
def test_registers_widths_and_instructions(spec, verb, target):
    code = sass.read(compiler.cubin(dict(sass.cuda_kinds(spec)[verb]), target))
    assert code.spilled_bytes == 0
    assert code.registers <= (128 if "hadamard" in spec else 80)
    ranks = 4 if verb == "decode_sum_encode" else 1
    assert code.executed(ranks) / sass.VALUES_OF_A_LANE <= MOST[spec][VERBS.index(verb)]
    # 32 values of bf16 are four accesses of 16 bytes; their codes are one or two, and nothing else moves codes.
    words = codecs.parse(spec).payload_bytes(1 << 20) // (1 << 18)
    values, codes = {"128": 4}, {"128": 2 if words == 4 else 1}
    loads, stores = code.accesses("LDG"), code.accesses("STG")
    assert loads["128"] == (values if verb == "encode" else codes)["128"]
    assert stores["128"] == (values if verb == "decode" else codes)["128"]
    # Beside these only a scale for each group moves.
    assert sum(loads.values()) - loads["128"] <= 2
    assert sum(stores.values()) - stores["128"] <= 2


@needs_nvrtc
@pytest.mark.parametrize("layout", ["Wide<4>", "Thin"])
def test_rows_that_are_not_aligned_spill_nothing_either(layout):
    form = cuda.spell(codecs.parse("int4g32+hadamard"))
    code = sass.read(compiler.cubin(dict(cuda.macros("Values<FP16>", form, layout, False)), "sm_86"))
    assert code.spilled_bytes == 0
    assert code.registers <= 128


@needs_nvrtc
def test_compiled_once_and_kept(monkeypatch):
    macros = dict(cuda.macros("Values<FP32>", "Affine<8, 32>", "Thin", False))
    code = compiler.cubin(macros, "sm_80")
    monkeypatch.setattr(compiler, "compiled", lambda *_: pytest.fail("compiled again"))
    assert compiler.cubin(macros, "sm_80") == code
    files = [*compiler.cache_folder().iterdir()]
    assert files
    assert all(path.suffix == ".cubin" for path in files)


@needs_nvrtc
def test_a_broken_source_is_shown_with_the_compilers_words():
    with pytest.raises(RuntimeError, match="NVRTC.*\n.*Nonsense"):
        compiler.compiled({"SOURCE": "Nonsense", "TARGET": "Nonsense", "LAYOUT": "Thin", "SUM_RANKS": "0"}, "sm_90")


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "flashcomm").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "compiled", lambda *_: b"code")
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    assert compiler.cubin({"SOURCE": "x"}, "sm_90") == b"code"
    assert os.listdir(tmp_path) == ["flashcomm"]


@pytest.fixture
def fresh_routes(monkeypatch):
    """Routes that are found anew, as they are remembered; afterwards, too."""
    remembered = (routes.route, routes.implementation, routes.common_implementation, launch.unavailable)
    for function in remembered:
        function.cache_clear()
    yield monkeypatch
    for function in remembered:
        function.cache_clear()


def test_off_unless_switched_on(fresh_routes):
    fresh_routes.delenv("FLASHCOMM_CUDA", raising=False)
    assert kernels.route(codecs.parse("int8g128"), "cuda")[0] == "triton"


def test_hot_formats_switch_and_others_stay_with_triton(fresh_routes):
    fresh_routes.setenv("FLASHCOMM_CUDA", "1")
    fresh_routes.setattr(compiler, "find", lambda: "libnvrtc.so")
    from flashcomm.kernels import gpu

    int8, nvfp4, turned = (codecs.parse(spec) for spec in ("int8g128", "nvfp4", "int4g128+hadamard"))
    assert kernels.route(int8, "cuda") == ("cuda", "compiled for this GPU")
    assert kernels.route(nvfp4, "cuda") == ("triton", "compiled for this GPU")
    assert kernels.route(turned, "cuda")[0] == "cuda"
    assert kernels.missing(turned, "cuda") is None
    # A sum goes from one format to another in one pass, by whoever has both.
    assert routes.common_implementation(int8, turned, "cuda", 4096) is cuda
    assert routes.common_implementation(int8, nvfp4, "cuda", 4096) is gpu
    assert routes.common_implementation(turned, nvfp4, "cuda", 4096) is None


def test_without_nvrtc_triton_serves_and_the_log_says_so_once(fresh_routes, caplog):
    fresh_routes.setenv("FLASHCOMM_CUDA", "1")
    fresh_routes.setattr(compiler, "find", lambda: None)
    for spec in ("int8g128", "int4g128"):
        assert kernels.route(codecs.parse(spec), "cuda") == ("triton", "compiled for this GPU")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "flashcomm.kernels"]
    assert "NVRTC is not installed" in line


@pytest.mark.parametrize(
    ("spec", "spelling"),
    [
        ("int8g128", "Affine<8, 128>"),
        ("fp8g128", "Block<4, 3, 126, 128, SCALE_FP32>"),
        ("mxfp4+hadamard", "Hadamard<Block<2, 1, 7, 32, E8M0>, 32>"),
        ("int8sg128", None),
        ("int4g16", None),
        ("int5g128", None),
        ("nvfp4", None),
        ("mxfp8_e5m2", None),
        ("int4g128+taco", None),
        ("bf16", None),
    ],
)
def test_which_formats_there_are(spec, spelling):
    assert cuda.spell(codecs.parse(spec)) == spelling


@pytest.mark.parametrize(
    ("cols", "dtype", "padding", "offset", "layout"),
    [
        (4096, torch.bfloat16, 0, 0, "Wide<16>"),
        (128, torch.bfloat16, 0, 0, "Wide<4>"),
        (4096, torch.bfloat16, 8, 0, "Wide<16>"),
        (4096, torch.bfloat16, 1, 0, "Thin"),
        (4096, torch.bfloat16, 0, 1, "Thin"),
        (4096, torch.float32, 4, 4, "Wide<16>"),
        (2880, torch.bfloat16, 0, 0, "Thin"),
    ],
)
def test_the_layout_that_addresses_allow(cols, dtype, padding, offset, layout):
    payload = torch.empty(2, codecs.parse("int8g128").payload_bytes(cols), dtype=torch.uint8)
    x = torch.empty(2, cols + padding + offset, dtype=dtype)[:, offset : offset + cols]
    assert launch.layout_of(x[None], payload, cols) == layout
    assert launch.layout_of(payload[None], x, cols) == layout


def test_one_row_has_no_stride():
    payload = torch.empty(3, 132, dtype=torch.uint8)
    assert launch.layout_of(torch.empty(1, 1, 128), payload[:1], 128) == "Wide<16>"


_DRIVER = """
// The part of the CUDA driver that launches, which keeps what it was given: (blocks, threads, stream, size, arguments).
#include <string.h>
long long launched[16];
int cuModuleLoadData(void** module, const void* code) { *module = (void*)code; return 0; }
int cuModuleGetFunction(void** f, void* module, const char* name) { *f = module; return strcmp(name, "move"); }
int cuGetErrorString(int code, const char** text) { *text = "as it was told"; return 0; }
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned shared,
                   void* stream, void** parameters, void** extra) {
  if (y != 1 || z != 1 || b != 1 || c != 1 || shared || parameters) return 1;
  if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4]) return 1;
  launched[0] = x, launched[1] = a, launched[2] = (long long)stream, launched[3] = *(size_t*)extra[3];
  memcpy(launched + 4, extra[1], *(size_t*)extra[3]);
  return x == 7 ? 700 : 0;
}
"""


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
def test_what_the_driver_is_given(monkeypatch, tmp_path):
    """The driver needs a GPU: this stands for it, and checks the call alone."""
    library = tmp_path / "driver.so"
    options = ["-x", "c++", "-fpermissive", "-w", "-shared", "-fPIC"]
    text = _DRIVER.replace("long long launched", 'extern "C" {\nlong long launched', 1) + "}"
    subprocess.run([cuda_on_cpu.COMPILER, *options, "-", "-o", library], input=text, text=True, check=True)
    monkeypatch.setattr(driver, "_library", functools.partial(driver.open_library, str(library)))
    kernel = driver.Kernel(b"code")
    x, payload = torch.zeros(1, 3, 256), torch.empty(3, 264, dtype=torch.uint8)
    _, arguments, _ = launch.plan(x, "Values<FP32>", payload, "Affine<8, 128>", 256)
    kernel(5, 1 << 40, arguments)
    launched = (ctypes.c_longlong * 16).in_dll(ctypes.CDLL(str(library)), "launched")
    assert launched[:4] == [5, driver.THREADS, 1 << 40, 56]
    assert launched[4:10] == [x.data_ptr(), 3 * 256 * 4, 256 * 4, payload.data_ptr(), 264, 3]
    assert launched[10] == 256 << 32 | 1
    with pytest.raises(RuntimeError, match="CUDA: as it was told"):
        kernel(7, 0, arguments)


@pytest.mark.gpu
@needs_nvrtc
@pytest.mark.parametrize("spec", ["int8g128", "int4g128", "int4g32", "mxfp4", "mxfp8_e4m3", "fp8g128"])
@pytest.mark.parametrize("transform", ["", "+hadamard"])
def test_a_gpu_gives_the_same_bytes(spec, transform):
    codec = codecs.parse(spec + transform)
    for dtype, cols in ((torch.bfloat16, 4096), (torch.float16, 128), (torch.float32, 333)):
        x = torch.randn(64, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[0, 5], x[1, 7], x[2] = float("nan"), float("inf"), 0
        payload = codec.encode(x)
        got = torch.empty_like(payload, device="cuda")
        cuda.encode(x.cuda(), codec, got)
        assert torch.equal(got.cpu(), payload)
        payloads = torch.stack([payload, payload.flip(0), payload]).cuda()
        out = torch.empty(64, cols, dtype=dtype, device="cuda")
        cuda.decode_sum(payloads, codec, out)
        assert torch.equal(
            out.cpu().view(torch.uint8), codecs.decode_sum(payloads.cpu(), codec, cols, dtype).view(torch.uint8)
        )
        cuda.decode_sum_encode(payloads, codec, codec, cols, got)
        assert torch.equal(got.cpu(), codecs.decode_sum_encode(payloads.cpu(), codec, codec, cols))
