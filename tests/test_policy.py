import pytest

from flashcomm.policy import Policy, Rule

FILE = """
codec = "int8"          # spelled short
phase = "all"
min_bytes = 4096
algorithm = "two_step"

[[layers]]
match = "model.layers.[0-3].mlp.*"
codec = "none"

[[layers]]
match = "*.mlp.down_proj"
codec = "int4g128:int8g128"

[hops]
pp = "int8"
"""


def test_first_match_wins():
    policy = Policy.parse(FILE)
    assert (policy.codec, policy.phase, policy.min_bytes, policy.algorithm) == ("int8g128", "all", 4096, "two_step")
    assert str(policy.codec_for("model.layers.2.mlp.down_proj")) == "none"
    assert str(policy.codec_for("model.layers.4.mlp.down_proj")) == "int4g128:int8g128"
    assert str(policy.codec_for("model.layers.2.self_attn.o_proj")) == "int8g128"
    assert list(map(str, policy.codecs)) == ["int8g128", "int4g128:int8g128"]
    assert str(policy) == (
        "int8g128, none for model.layers.[0-3].mlp.*, int4g128:int8g128 for *.mlp.down_proj; "
        "prefill and decode, from 4 KiB, two_step; pp hops in int8g128"
    )


def test_file_survives_a_round_trip(tmp_path):
    policy = Policy.parse(FILE)
    policy.save(tmp_path / "policy.toml", comments=["KL 0.003 on 20k tokens", "", 'of "here"'])
    assert Policy.load(tmp_path / "policy.toml") == policy
    assert (tmp_path / "policy.toml").read_text().startswith('# KL 0.003 on 20k tokens\n#\n# of "here"\n')


@pytest.mark.parametrize(
    "text, message",
    [
        ("codec = 8", 'p.toml: codec = 8: use a codec, such as "int8g128", or "none"'),
        ('codec = "int9"', "p.toml: codec = 'int9': unknown codec"),
        ('codecs = "int8"', "p.toml: unknown key codecs. Did you mean codec? Allowed: codec, phase, min_bytes"),
        ('phase = "decode"', "p.toml: phase = 'decode': use prefill or all"),
        ("min_bytes = -1", "p.toml: min_bytes = -1: use a number of bytes, 0 or more"),
        ("min_bytes = true", "p.toml: min_bytes = True: use a number"),
        ('algorithm = "ring"', "p.toml: algorithm = 'ring': use one of auto, one_step"),
        ('layers = "all"', "p.toml: layers = 'all': use [[layers]]"),
        ('[[layers]]\nmatch = "a"', "p.toml: layers[1].codec = None: give a text"),
        ('[[layers]]\nname = "a"', "p.toml: unknown key layers[1].name. Allowed: match, codec"),
        ('[[layers]]\nmatch = "a"\ncodec = "fp7"', "p.toml: codec of layers 'a' = 'fp7': unknown codec"),
        ("hops = 3", "p.toml: hops = 3: use a table [hops]"),
        ('[hops]\ntp = "int8"', "p.toml: unknown key hops.tp. Did you mean pp? Allowed: pp"),
        ('[hops]\npp = "int9"', "p.toml: hops.pp = 'int9': unknown codec"),
        ('[hops]\npp = "int4:int8"', "p.toml: hops.pp = 'int4:int8': a hop is one transfer: use one format"),
        ("codec = ", "p.toml: Invalid value"),
        ("int8", "p.toml: Expected '='"),
    ],
)
def test_errors_name_file_key_and_what_is_allowed(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        Policy.load("p.toml")
    assert str(error.value).startswith(message)


def test_missing_file():
    with pytest.raises(ValueError, match="cannot read the policy 'nowhere.toml'.*No such file"):
        Policy.load("nowhere.toml")


def test_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FLASHCOMM_POLICY", raising=False)
    monkeypatch.delenv("FLASHCOMM_CODEC", raising=False)
    monkeypatch.delenv("FLASHCOMM_OVERLAP", raising=False)
    assert Policy.from_environment() is None
    monkeypatch.setenv("FLASHCOMM_OVERLAP", "3")
    assert Policy.from_environment() == Policy(codec="none", overlap=3)
    monkeypatch.setenv("FLASHCOMM_OVERLAP", "always")
    with pytest.raises(ValueError, match=r"FLASHCOMM_OVERLAP: overlap = 'always': use \"off\", \"auto\" or a number"):
        Policy.from_environment()
    monkeypatch.setenv("FLASHCOMM_OVERLAP", "auto")
    monkeypatch.setenv("FLASHCOMM_CODEC", "int6")
    assert Policy.from_environment() == Policy(codec="int6g128", overlap="auto")
    monkeypatch.delenv("FLASHCOMM_OVERLAP")
    monkeypatch.setenv("FLASHCOMM_CODEC", "int6")
    assert Policy.from_environment() == Policy(codec="int6g128")
    monkeypatch.setenv("FLASHCOMM_CODEC", "int9")
    with pytest.raises(ValueError, match="FLASHCOMM_CODEC: codec = 'int9': unknown codec"):
        Policy.from_environment()
    Policy(layers=(Rule(match="*", codec="mxfp4"),)).save(tmp_path / "p.toml")
    monkeypatch.setenv("FLASHCOMM_POLICY", str(tmp_path / "p.toml"))
    with pytest.raises(ValueError, match="are both set"):
        Policy.from_environment()
    monkeypatch.delenv("FLASHCOMM_CODEC")
    policy = Policy.from_environment()
    assert policy is not None and str(policy.codec_for("x")) == "mxfp4"


@pytest.mark.parametrize("overlap", [1, 17, True, "2", "of", 2.5])
def test_overlap_that_is_not_allowed(overlap):
    with pytest.raises(ValueError, match='overlap = .*: use "off", "auto" or a number of parts from 2 to 16'):
        Policy.from_keys({"overlap": overlap})


def test_overlap_is_saved(tmp_path):
    policy = Policy(overlap=2)
    policy.save(tmp_path / "p.toml")
    assert Policy.load(tmp_path / "p.toml") == policy
    assert str(policy).endswith(", in 2 parts")
