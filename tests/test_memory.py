"""Memory that is left, of the machine and of control groups, from files as Linux shows them."""

import pytest

from medmoco.data.memory import available_memory

MIB = 1 << 20


def show(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def group(folder, limit, used, cached=0):
    """Of version 2; `cached` bytes of files, in halves."""
    stat = f"anon 5\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached // 2}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


@pytest.fixture
def root(tmp_path):
    show(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8192 kB\n",
            "proc/self/cgroup": "0::/slice/job\n",
        },
    )
    return tmp_path


def test_without_groups_it_is_what_the_machine_has(root):
    assert available_memory(root) == 8 * MIB
    show(root, group("sys/fs/cgroup/slice/job", "max", MIB))
    assert available_memory(root) == 8 * MIB


def test_a_limit_below_the_machines_counts_without_cached_files(root):
    show(root, group("sys/fs/cgroup/slice/job", 5 * MIB, 4 * MIB, cached=2 * MIB))
    assert available_memory(root) == 3 * MIB


def test_the_narrowest_of_the_groups_above_counts_too(root):
    show(root, group("sys/fs/cgroup/slice/job", 5 * MIB, MIB))
    show(root, group("sys/fs/cgroup/slice", 5 * MIB, 4 * MIB))
    assert available_memory(root) == MIB


def test_a_container_sees_its_group_at_the_top(root):
    show(root, group("sys/fs/cgroup", 2 * MIB, 3 * MIB))
    assert available_memory(root) == 0


def test_groups_of_version_1_count(root):
    folder = "sys/fs/cgroup/memory/job"
    stat = "cache 9\ninactive_file 1\ntotal_inactive_file 1048576\ntotal_active_file 0\n"
    show(
        root,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/other\n3:memory:/job\n",
            f"{folder}/memory.limit_in_bytes": f"{4 * MIB}",
            f"{folder}/memory.usage_in_bytes": f"{3 * MIB}",
            f"{folder}/memory.stat": stat,
        },
    )
    assert available_memory(root) == 2 * MIB


def test_a_system_that_does_not_say_gives_all_of_its_memory(tmp_path):
    assert available_memory(tmp_path) > 100 * MIB
