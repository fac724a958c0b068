"""The block `published` of an experiment: its checks, and that it changes no run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from relora.common.errors import ConfigError
from relora.config.compose import Composer, compose, composed, resolved
from relora.config.frozen import freeze, read_frozen
from relora.config.published import PublishedConfig
from relora.config.run import RunConfig
from relora.config.tuned import Presets
from relora.config.typed import checked, structured

GALORE = {"divisor": "batches_plus_one", "micro_batch_sequences": 256, "gpus": 1, "batches_per_gpu": 182}
PLAIN = resolved(composed([]))


def with_block(block: Any) -> RunConfig:
    return checked(structured({**PLAIN, "published": block}))


@pytest.mark.parametrize(
    ("block", "value", "remedy"),
    [
        ({"divisor": "batches"}, "published.divisor=batches ", "tokens, batches_plus_one"),
        ({**GALORE, "gpus": None}, "published.gpus=null", "give the value of the paper"),
        ({**GALORE, "gpus": 0}, "published.gpus=0 ", "at least 1"),
        ({**GALORE, "micro_batch_sequences": 10**9}, "published.micro_batch_sequences=1000000000 ", "at most"),
        ({"batches_per_gpu": 182}, "published.batches_per_gpu=182 ", "leave it out"),
        ({"perplexity": {"full": 0.5}}, "published.perplexity.full=0.5 ", "write null"),
        ({"perplexity": {"full": float("inf")}}, "published.perplexity.full=inf ", "write null"),
        ({"perplexity": {"full": "high"}}, "published.perplexity.full: Value 'high'", "Float"),
        ({"perplexity": {"a b": 3.0}}, "published.perplexity=a b ", "only letters"),
        ({"perplexity": {1: 3.0, "full": "???"}}, "published.perplexity.full", "missing"),
        ({"source": " "}, "published.source= ", "empty"),
        ({"gpu": 1}, "published.gpu", "unknown key"),
    ],
)
def test_a_wrong_block_is_refused_with_the_value_and_the_remedy(block: Any, value: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_block({"source": "a paper", **block})
    assert value in str(error.value)
    assert remedy in str(error.value)


def test_a_block_without_a_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="source"):
        with_block({"perplexity": {"full": 34.06}})


def test_the_block_changes_no_name_of_a_run() -> None:
    plain, block = with_block(None), with_block({"source": "a paper", **GALORE, "perplexity": {"full": 34, "x": None}})
    assert block.published == PublishedConfig(source="a paper", perplexity={"full": 34.0, "x": None}, **GALORE)
    for name in ("config_hash", "comparison_key", "setting_key", "variant", "identity"):
        assert getattr(plain, name) == getattr(block, name)
    # A value of the block may be set on the command line. The other values of the experiment stay.
    setting = ["experiments=paper/galore_60m", "method=full"]
    for made in (compose([*setting, "published.gpus=2"]), Composer().compose([*setting, "published.gpus=2"])):
        assert made.published is not None
        assert (made.published.gpus, made.published.micro_batch_sequences) == (2, 256)
        assert made.config_hash == compose(setting).config_hash


def test_a_frozen_config_keeps_the_block_and_may_be_older_than_it(tmp_path: Path) -> None:
    block = with_block({"source": "a paper", "perplexity": {"full": 34.06, "lora": None}})
    file = tmp_path / "run" / "config.yaml"
    freeze(block, file)
    assert read_frozen(file).published == block.published
    values = yaml.safe_load(file.read_text())
    del values["published"]
    file.write_text(yaml.safe_dump(values))
    older = read_frozen(file)
    assert older.published is None
    assert older.config_hash == block.config_hash


def test_a_launch_records_how_a_run_differs_from_the_experiment() -> None:
    def differs(*overrides: str) -> list[str]:
        given = ["experiments=paper/galore_60m", *overrides]
        published = Presets().noted(compose(given), given).published
        assert published is not None
        return published.differs

    assert differs("method=full") == []
    assert differs("method=galore", "trainer.seed=1", "runs_dir=elsewhere", "optimizer.learning_rate=5e-3") == []
    found = differs("method=galore", "method.rank=64", "model=llama_9m", "trainer.total_steps=8393")
    assert found == [
        "model=llama_9m, in the experiment llama_60m",
        "trainer.total_steps=8393, in the experiment 10000",
        "method.rank=64, in the experiment 128",
    ]
    (found, *_) = differs("method=full", "data=stdlib")
    assert found.startswith("data.name=stdlib, in the experiment ")
    plain = compose([])
    assert Presets().noted(plain, []).published is None
