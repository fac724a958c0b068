"""Fields that are newer than the scheme of the hash: earlier runs keep their hash, and other values have another."""

from pathlib import Path

import pytest

from relora.config import identity
from relora.config.compose import Composer
from relora.config.frozen import freeze, thaw
from relora.config.plan import run_plan
from relora.config.plan_text import text
from relora.studies.compare import labels_of

COMPOSER = Composer()
PAD, WITHIN = "data.packing=pad", "data.attend_across_documents=false"


def test_the_values_of_later_fields_never_change() -> None:
    """They are what relora did before the field existed. Another value would rename all runs."""
    assert {
        "data.packing": "packed",
        "data.attend_across_documents": True,
        "method.square_side": "right",
        **dict.fromkeys(["data.limit_tokens", "data.held_out_tokens", "data.validation_path", "data.test_path"]),
        "model.kv_heads": None,
    } == identity.LATER_FIELDS


@pytest.mark.parametrize("method", ["relora", "full", "galore"])
def test_a_later_field_has_no_part_in_the_hash_while_it_has_its_earlier_value(method: str) -> None:
    plain = COMPOSER.compose([f"method={method}"])
    spelled = COMPOSER.compose([f"method={method}", "data.packing=packed", "data.attend_across_documents=true"])
    assert identity.hashes(spelled) == identity.hashes(plain)
    assert not set(identity.LATER_FIELDS) & set(plain.identity)
    assert identity.spelled_out(plain).items() >= identity.LATER_FIELDS.items()


def test_as_many_heads_of_keys_and_values_as_of_queries_are_the_same_run() -> None:
    plain, grouped = COMPOSER.compose([]), COMPOSER.compose(["model.kv_heads=2"])
    written_out = COMPOSER.compose(["model.kv_heads=4"])
    assert written_out.config_hash == plain.config_hash  # the same model, told as no difference
    assert identity.spelled_out(written_out) == identity.spelled_out(plain)
    assert len({config.config_hash for config in (plain, grouped)}) == 2
    assert grouped.comparison_key != plain.comparison_key


def test_the_side_of_square_matrices_is_hashed_when_it_differs_and_has_an_effect() -> None:
    galore, left = ["method=galore"], "method.square_side=left"
    plain, other = COMPOSER.compose(galore), COMPOSER.compose([*galore, left])
    assert COMPOSER.compose([*galore, "method.square_side=right"]).config_hash == plain.config_hash
    assert other.config_hash != plain.config_hash
    no_squares = [*galore, "method.target_modules=[up_proj]"]
    assert COMPOSER.compose([*no_squares, left]).config_hash == COMPOSER.compose(no_squares).config_hash


def test_the_value_and_not_the_default_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the default became another one, a run with it would get another hash."""
    plain = COMPOSER.compose([])
    monkeypatch.setitem(identity.LATER_FIELDS, "data.packing", "pad")
    assert plain.identity["data.packing"] == "packed"


def test_other_values_are_other_runs_that_are_not_compared() -> None:
    configs = [COMPOSER.compose(overrides) for overrides in ([], [PAD], [WITHIN])]
    for key in ("config_hash", "variant", "comparison_key", "setting_key"):
        assert len({getattr(config, key) for config in configs}) == 3, key
    assert identity.spelled_out(configs[1])["data.packing"] == "pad"
    labels = labels_of(configs)
    assert labels[configs[1].variant] == "relora attend_across_documents=True packing=pad"


@pytest.mark.parametrize("override", [PAD, WITHIN])
def test_a_frozen_config_keeps_its_hash(override: str, tmp_path: Path) -> None:
    config = COMPOSER.compose([override, f"runs_dir={tmp_path}"])
    freeze(config, tmp_path / "run" / "config.yaml")
    assert thaw(tmp_path / "run" / "config.yaml").config_hash == config.config_hash


def test_a_config_from_before_the_fields_is_read(tmp_path: Path) -> None:
    config = COMPOSER.compose([f"runs_dir={tmp_path}"])
    file = tmp_path / "run" / "config.yaml"
    freeze(config, file)
    earlier = [line for line in file.read_text().splitlines() if not line.strip().startswith(("packing", "attend_"))]
    assert len(earlier) == len(file.read_text().splitlines()) - 2
    file.write_text("\n".join(earlier))
    read = thaw(file)
    assert (read.data.packing, read.data.attend_across_documents) == ("packed", True)
    assert read.config_hash == config.config_hash


def test_a_plan_says_that_its_tokens_include_padding() -> None:
    plain, pad = COMPOSER.compose([]), COMPOSER.compose([PAD])
    assert run_plan(pad).total_flops == run_plan(plain).total_flops
    assert "1,228,800 in all, with padding" in text(run_plan(pad), pad)
    assert "padding" not in text(run_plan(plain), plain)


def test_the_mask_of_documents_is_in_the_plan() -> None:
    """16 sequences of 128 tokens at a time: 4 bytes for each pair of tokens."""
    plain, within = (run_plan(COMPOSER.compose(overrides)) for overrides in ([], [WITHIN]))
    assert within.peak_bytes - plain.peak_bytes == 4 * 16 * 128 * 128
    assert within.peak_bytes_at_full_rank - plain.peak_bytes_at_full_rank == 4 * 16 * 128 * 128
