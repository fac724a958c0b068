"""The settings of methods with Adam in a subspace: checks, and which runs are the same."""

import pytest

from relora.common.errors import ConfigError
from relora.config.compose import Composer
from relora.config.tuned import Presets

COMPOSER = Composer()
ARMS = ["galore", "fira", "apollo", "apollo_mini"]
LIMITED = ["fira", "apollo", "apollo_mini"]


@pytest.mark.parametrize("method", ARMS)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer=muon", "method={} is Adam in a subspace .*optimizer=muon; use optimizer=adamw"),
        ("method.rank=129", r"rank=129 exceeds min\(in, out\)=128"),
        ("method.rank=0", r"method\.rank=0 must be at least 1"),
        ("method.scale=0", r"method\.scale=0.* must be positive"),
        ("method.scale=1e7", r"method\.scale=1.* must be at most"),
        ("method.update_interval_steps=0", r"method\.update_interval_steps=0 must be at least 1"),
        ("method.square_side=up", r"method\.square_side=up is not one of right, left"),
        ("method.target_modules=[x_proj]", "'x_proj' matches no linear layer"),
    ],
)
def test_a_setting_that_does_not_work_is_refused(method: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.format(method)):
        COMPOSER.compose([f"method={method}", override])


@pytest.mark.parametrize("method", LIMITED)
@pytest.mark.parametrize("limit", ["0.99", "-1", "nan"])
def test_a_limit_below_one_is_refused(method: str, limit: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.growth_limit=.* must be at least 1.* null means no limit"):
        COMPOSER.compose([f"method={method}", f"method.growth_limit={limit}"])


@pytest.mark.parametrize("method", ARMS)
def test_settings_without_effect_are_not_hashed(method: str) -> None:
    def hash_of(*overrides: str) -> str:
        return COMPOSER.compose([f"method={method}", *overrides]).config_hash

    assert hash_of("method.update_interval_steps=600") == hash_of("method.update_interval_steps=900")
    assert hash_of("method.update_interval_steps=600") != hash_of("method.update_interval_steps=599")
    assert hash_of("method.square_side=left") != hash_of()
    assert hash_of("method.target_modules=[up_proj]", "method.square_side=left") == hash_of(
        "method.target_modules=[up_proj]"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", LIMITED)
def test_rates_that_nobody_searched_are_called_untuned(method: str) -> None:
    overrides = [f"method={method}"]
    found = Presets().noted(COMPOSER.compose(overrides), overrides).rates
    assert (found.basis, found.source) == ("untuned", f"conf/method/{method}.yaml")
