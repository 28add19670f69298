"""The forks that tests kill, and what is left of them."""

import threading

from tqdm.auto import tqdm  # which transformers' bars are

from tests.killing import killed_at_random


def test_killed_in_a_progress_bar_it_leaves_the_other_processes_theirs() -> None:
    for _ in killed_at_random(tqdm.get_lock().acquire, kills=2, longest=0.2):
        bars = threading.Thread(target=lambda: list(tqdm(range(3))), daemon=True)
        bars.start()
        bars.join(timeout=10)
        assert not bars.is_alive()
