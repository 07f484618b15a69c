"""Processes started in every way Python has, at the descriptor limit too, while regions are open."""

from __future__ import annotations

import pytest

from tests.integration.test_pager_fork import run

SPAWNS = """
stop = threading.Event()
wrong = []

def read(array):
    while not stop.is_set():
        if not (array == BEFORE).all():
            wrong.append(1)

def in_preexec():
    signal.alarm(20)
    if not (array == BEFORE).all():
        os._exit(3)

TRUE = [sys.executable, "-S", "-c", "print('out')"]
with Pager(SIZE // 2) as pager, pager.map(MemoryStore(BEFORE.copy())) as region:
    array = region.array(np.uint64)
    thread = threading.Thread(target=read, args=(array,))
    thread.start()
    try:
        for _ in range(3):
            assert subprocess.run(TRUE, capture_output=True, timeout=20).stdout == b"out\\n"
            done = subprocess.run(TRUE, capture_output=True, timeout=20, preexec_fn=in_preexec)
            assert done.stdout == b"out\\n" and done.returncode == 0, done
            assert os.system("exit 5") == 5 << 8
            assert ended(os.posix_spawn(TRUE[0], TRUE, os.environ, file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])) == 0
            # What another program reads of the region's memory is the region's.
            echo = subprocess.run(["cat"], input=region.view(), capture_output=True, timeout=20)
            assert echo.stdout == BEFORE.tobytes()
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert (array == BEFORE).all()
    del array, thread, read
"""


def test_other_programs_start_while_a_thread_faults() -> None:
    run(SPAWNS)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method: str) -> None:
    run(
        f"method = {method!r}"
        + """
context = multiprocessing.get_context(method)
with Pager(SIZE // 2) as pager, pager.map(MemoryStore(BEFORE.copy())) as region:
    array = region.array(np.uint64)
    array[::5] = 3
    expected = BEFORE.copy()
    expected[::5] = 3
    with context.Pool(2) as pool:
        copies = pool.map(np.copy, [array, array[::2], array[:1]])
        region.evict()
        assert (copies[0] == expected).all() and (copies[1] == expected[::2]).all()
        assert (pool.apply(np.negative, (array,)) == -expected).all()
    if method == "fork":
        def child(array):
            assert (array == expected).all()
            array[:] = 0
            region.evict()
            assert not array.any()

        process = context.Process(target=child, args=(array,))
        process.start()
        array[:] += np.uint64(1)
        region.evict()
        process.join(30)
        assert process.exitcode == 0, process.exitcode
        expected += np.uint64(1)
        process.close()
        del child
    assert (array == expected).all()
    del array
"""
    )


DESCRIPTORS = """
def fill(free):
    # All descriptors but `free` of them.
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for _ in range(min(free, len(taken))):
        os.close(taken.pop())
    return taken

def empty(taken):
    for descriptor in taken:
        os.close(descriptor)

with tempfile.TemporaryDirectory() as directory:
    path = stored(directory)
    ways = set()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for first in (True, False):
        for free in [0, 1, 2, 3, 4, 5, 6, 8, 12]:
            taken = [] if first else fill(free)
            try:
                with Pager(SIZE // 2, **OPTIONS) as pager, pager.map(FileStore(path)) as region:
                    region.advise("random")
                    taken = taken or fill(free)
                    array = region.array(np.uint64)
                    assert (array == BEFORE).all()
                    status = ended(in_child(lambda: (array == BEFORE).all()))
                    assert status in (0, -signal.SIGSEGV, -signal.SIGBUS), (first, free, status)
                    ways.add(status)
                    assert (array == BEFORE).all()
                    region.evict()
                    assert (array == BEFORE).all()
                    del array
            except UspaceError as error:
                assert not first, error
                ways.add(type(error).__name__)
            finally:
                empty(taken)
    assert 0 in ways, ways
    with Pager() as pager, pager.map(FileStore(path)) as region:  # nothing was left open
        assert (region.array(np.uint64) == BEFORE).all()
    assert len(os.listdir("/proc/self/fd")) < 12, os.listdir("/proc/self/fd")
"""


@pytest.mark.parametrize("move", [True, False], ids=["move", "copy"])
def test_opening_and_forking_at_the_descriptor_limit(move: bool) -> None:
    run(f"OPTIONS = {{'move': {move}}}\n" + DESCRIPTORS)


def test_a_function_store_belongs_to_the_process_that_made_it() -> None:
    run("""
with tempfile.TemporaryDirectory() as directory:
    with open(os.path.join(directory, "kernel_function.py"), "w") as file:
        file.write('''
import numpy as np
def numbers(offset, length):
    return np.arange(offset // 8, (offset + length) // 8, dtype=np.uint64).tobytes()
''')
    sys.path.insert(0, directory)
    import kernel_function
    expected = np.arange(SIZE // 8, dtype=np.uint64)
    with Pager() as pager, pager.map(FunctionStore(kernel_function.numbers, SIZE)) as region:
        array = region.array(np.uint64)
        assert (array[: SIZE // 32] == expected[: SIZE // 32]).all()
        assert ended(in_child(lambda: int(array[0]) == 0)) == -signal.SIGSEGV
        assert ended(in_child(lambda: int(array[-1]) == 0)) == -signal.SIGSEGV

        def child():
            global array
            with Pager() as own, own.map(FunctionStore(kernel_function.numbers, SIZE)) as other:
                assert (other.array(np.uint64) == expected).all()
            del array
            pager.close()
            return True

        status = ended(in_child(child))
        assert status == 0, status
        assert (array == expected).all()
        del array
""")
