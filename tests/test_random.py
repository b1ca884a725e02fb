"""Random numbers are a pure function of seed, purpose and path, and no two of these share a stream."""

import jax

from fslora_jax.random import Purpose, device_key, host_rng


def test_purposes_keep_their_numbers():
    """Old runs resume with them: append a purpose, but renumber none."""
    old = [
        "INIT",
        "SPLIT",
        "PARTITION",
        "RESOURCES",
        "COHORT",
        "SKETCH",
        "BATCH",
        "DROPOUT",
        "NETWORK",
        "SERVER",
    ]
    assert [purpose.name for purpose in sorted(Purpose)][: len(old)] == old
    assert sorted(Purpose) == list(range(len(Purpose)))


def test_device_keys_differ_in_seed_and_purpose_and_repeat():
    def bits() -> list[tuple]:
        keys = [device_key(seed, purpose) for seed in range(3) for purpose in Purpose]
        return [tuple(jax.random.key_data(key).tolist()) for key in keys]

    assert len(set(bits())) == 3 * len(Purpose)
    assert bits() == bits()


def test_host_streams_differ_in_seed_purpose_and_path_and_repeat():
    """Among paths of one length, as a purpose has them: NumPy's seeds ignore zeros at the end."""

    def draws() -> list[int]:
        paths = [(i, j) for i in range(3) for j in range(3)]
        places = [(seed, purpose, path) for seed in range(3) for purpose in Purpose for path in paths]
        return [int(host_rng(seed, purpose, *path).integers(2**62)) for seed, purpose, path in places]

    assert len(set(draws())) == len(draws()) == 27 * len(Purpose)
    assert draws() == draws()


def test_generators_are_pinned():
    """A run goes on to the same end on another machine only if these never change."""
    assert host_rng(0, Purpose.COHORT, 3).integers(1000, size=3).tolist() == [792, 385, 358]
    assert jax.random.key_data(device_key(0, Purpose.SKETCH)).tolist() == [1524306142, 1887795613]
