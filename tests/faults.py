"""What can go wrong with a run, done to a small one on purpose, and whether anything is lost.

Each function does one thing to a run in a folder of its own, checks what is said of it and that the results are those
of a run that nothing happened to, and returns what it measured. `python tests/faults.py` does all of them and writes
the table that the book shows, `data/faults/faults.csv`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]

CODE = """
import numpy as np, pandas as pd, torch
from torch import nn
from polca_lib import Subject

def loss(model, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")

def batch(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, generator=generator), torch.randint(4, (n, 2), generator=generator)

def setup():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    tokens = pd.DataFrame({"kind": np.tile(["one", "two"], 40)})
    return Subject(model.eval(), loss, batch(1, 40), hessian=batch(2, 30), tokens=tokens)
"""
SETTINGS = """
folder = "results"
threads = 1
memory = 60_000
[code]
setup = "my_run:setup"
[checkpoints]
kind = "safetensors"
path = "checkpoints"
[basis]
n_vectors = 12
k = 4
tolerance = 0.1
[clustering]
min_cluster_size = 8
"""
STEPS = range(0, 121, 20)
MOVING = ("seconds.txt", ".lock", "report.html")  # files that tell of time
STAGES = {"basis": "basis.zarr", "projection": "projections.zarr", "clusters": "clusters.zarr"}


class Fault(AssertionError):
    """Something was lost, or nothing was said."""


def check(holds, message):
    if not holds:
        raise Fault(message)


def make(folder):
    """A run that is not begun yet: code, settings, and checkpoints of a random walk."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my_run.py").write_text(CODE)
    (folder / "polca.toml").write_text(SETTINGS)
    (folder / "checkpoints").mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)}
    now = {name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
    for step in STEPS:
        save_file(now, folder / "checkpoints" / f"step-{step}.safetensors")
        now = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in now.items()}
    return folder


def work(folder, log, stages=("basis", "projections", "labels", "report"), before=None, environment=()):
    """Body of a process: go on with the run, as `polca run` does."""
    os.environ.update(environment)
    with log.open("a") as told, contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            if before == "clock set back":
                time.time = lambda: 86400.0
                time.time_ns = lambda: 86400 * 10**9
            from polca_lib.analysis.runfile import open_analysis

            analysis = open_analysis(folder / "polca.toml", verify=True)
            for stage in stages:
                analysis.report(analysis.folder / "report.html") if stage == "report" else getattr(analysis, stage)
        except BaseException:
            traceback.print_exc()
            told.flush()
            os._exit(1)
        told.flush()
        os._exit(0)


_FORK = multiprocessing.get_context("forkserver")
# What a process needs is imported once, in the server that others are forked from.
_FORK.set_forkserver_preload(["polca_lib.analysis.runfile", "torch._dynamo", "dask.array", "plotly.io", "faults"])


def start(folder, **settings):
    process = _FORK.Process(target=work, args=(folder, folder / "log.txt"), kwargs=settings)
    process.start()
    return process


def finish(folder, **settings):
    """Go on until it ends; the exit code, and what it said."""
    (folder / "log.txt").write_text("")
    process = start(folder, **settings)
    process.join()
    return process.exitcode, (folder / "log.txt").read_text()


def results(folder):
    """Bytes of all results that don't tell of time; halves of files that a killed process left are none."""
    files = sorted(file for file in (folder / "results").rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.name not in MOVING and file.suffix != ".partial"
    }


def finished(folder):
    """The pieces that are done, each with the identities of its files: a file that is written again has another."""
    from polca_lib.storage.artefacts import DamagedFile
    from polca_lib.storage.pieces import PieceStore

    found = {}
    for stage, name in STAGES.items():
        for path in (folder / "results").glob(f"{stage}-*/{name}"):
            try:
                store = PieceStore.open(path)
            except (FileNotFoundError, DamagedFile):
                continue
            for piece in np.flatnonzero(store.done()):
                files = [path / inner for inner in store.files(int(piece))]
                found[stage, int(piece)] = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    return found


def reference(folder):
    """Results of a run that nothing happens to."""
    code, told = finish(make(folder))
    check(code == 0, f"the run that nothing happens to fails:\n{told}")
    return results(folder)


def same(folder, expected, besides=False):
    """All results are those expected, to the byte; ``besides`` others, of what was another checkpoint for a while."""
    got = results(folder)
    names = expected.keys() if besides else got.keys() | expected.keys()
    odd = sorted(name for name in names if got.get(name) != expected.get(name))
    check(not odd, f"{len(odd)} files differ from those of a run that nothing happened to, such as {odd[:3]}")


def killed(folder, expected, moments=50, seed=0):
    """SIGKILL at random moments over all stages; each time the next process goes on."""
    rng, at, again, cycles = np.random.default_rng(seed), dict.fromkeys([*STAGES, "before any"], 0), 0, 0
    began = time.perf_counter()
    finish(make(folder / "whole"))
    whole = time.perf_counter() - began
    run = make(folder / f"cycle-{cycles}")
    kept = {}
    while sum(at.values()) < moments:
        process = start(run)
        process.join(rng.uniform(0.1, 1) * whole)
        if process.exitcode == 0:  # it was done: the next begins anew
            same(run, expected)
            cycles += 1
            run, kept = make(folder / f"cycle-{cycles}"), {}
            continue
        check(process.exitcode is None, f"a process failed:\n{(run / 'log.txt').read_text()}")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = finished(run)
        again += sum(now.get(piece) != files for piece, files in kept.items())
        begun = [stage for stage, name in STAGES.items() if list((run / "results").glob(f"{stage}-*"))]
        at[begun[-1] if begun else "before any"] += 1
        kept = now
    code, told = finish(run)
    check(code == 0, told)
    again += sum(finished(run).get(piece) != files for piece, files in kept.items())
    check(again == 0, f"{again} pieces that were done were computed again")
    same(run, expected)
    shown = ", ".join(f"{n} in {stage}" for stage, n in at.items())
    return {"tries": sum(at.values()), "figure": f"{shown}; {cycles + 1} runs ended; 0 finished pieces computed again"}


DAMAGES = {
    "flipped": lambda content: content[:-3] + bytes([content[-3] ^ 4]) + content[-2:],
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
}


def damaged_pieces(folder, expected, damages=tuple(DAMAGES), seed=0):
    """A file of each stage, bit-flipped, truncated and emptied: named, and made anew, with nothing else."""
    run, rng, tries, others = make(folder / "run"), np.random.default_rng(seed), 0, 0
    code, told = finish(run)
    check(code == 0, told)
    for stage, name in STAGES.items():
        for damage in map(DAMAGES.get, damages):
            (path,) = (run / "results").glob(f"{stage}-*/{name}")
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0].isdigit())
            file = files[rng.integers(len(files))]
            before = finished(run)
            file.write_bytes(damage(file.read_bytes()))
            code, told = finish(run)
            check(code == 0, told)
            # A mark is not a result: the piece is made anew without a word.
            check("damaged" in told or file.parent.name == "_done", f"nothing was said of {file}:\n{told}")
            same(run, expected)
            rewritten = sum(files != before[piece] for piece, files in finished(run).items())
            others += max(0, rewritten - 1)
            tries += 1
    return {
        "tries": tries,
        "figure": f"{tries} found and made anew; {others} other pieces written again",
    }


def damaged_checkpoint(folder, expected, damages=tuple(DAMAGES), seed=0):
    """A checkpoint is flipped or truncated after it was first read: refused by name; put back, the run goes on."""
    rng, tries = np.random.default_rng(seed), 0
    for damage in map(DAMAGES.get, damages):
        run = make(folder / f"run-{tries}")
        finish(run, stages=("basis",))
        file = run / "checkpoints" / f"step-{rng.choice([0, 40, 80])}.safetensors"  # which the basis read
        sound = file.read_bytes()
        file.write_bytes(damage(sound))
        os.utime(file)
        code, told = finish(run)
        check(code == 1 and file.name in told, f"{file} was damaged, and the run said:\n{told}")
        file.write_bytes(sound)
        code, told = finish(run)
        check(code == 0, told)
        same(run, expected, besides=True)
        tries += 1
    return {"tries": tries, "figure": f"{tries} refused by name; {tries} went on once it was put back"}


def not_finite(folder, expected):
    """NaN in a checkpoint from the start: refused by name, projections before it stay."""
    from safetensors.torch import load_file, save_file

    run = make(folder / "run")
    file = run / "checkpoints" / "step-60.safetensors"
    weights = load_file(file)
    weights["0.bias"][2] = float("nan")
    save_file(weights, file)
    given = file.read_bytes()
    (run / "polca.toml").write_text(SETTINGS.replace("[basis]", '[basis]\nkind = "random"'))
    code, told = finish(run)
    check(code == 1 and "step-60.safetensors" in told and "not finite" in told, told)
    kept = {piece for piece in finished(run) if piece[0] == "projection"}
    check(kept, "no projection was kept")
    check(given == file.read_bytes(), "the checkpoint was changed")
    return {"tries": 1, "figure": f"refused by name; {len(kept)} pieces of projections before it kept"}


def two_processes(folder, expected, pairs=3):
    """Two at once on one run: the second waits, and finds the work done."""
    waited = 0
    for pair in range(pairs):
        run = make(folder / f"run-{pair}")
        both = [start(run), start(run)]
        for process in both:
            process.join()
        told = (run / "log.txt").read_text()
        check([process.exitcode for process in both] == [0, 0], told)
        waited += "waiting for it to end" in told
        same(run, expected)
    return {"tries": pairs, "figure": f"{waited} of {pairs} times one waited for the other; nothing interleaved"}


@contextlib.contextmanager
def small_disk(folder, kibibytes):
    """A file system of a given size; needs the right to mount one."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def may_mount():
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "disk"
        try:
            with small_disk(place, 100):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def disk_full(folder, expected, times=5, seed=0):
    """The disk of the results fills up at several moments: said with what to do; with room again, the run goes on."""
    sizes, kept = np.random.default_rng(seed).uniform(0.1, 0.9, times), []
    whole = 4 * sum(-(-len(content) // 4096) for content in expected.values())
    for index, size in enumerate(sizes):
        run = make(folder / f"run-{index}")
        with small_disk(run / "results", int(size * whole)):
            code, told = finish(run)
            check(code == 1 and "No space left" in told, f"the disk was full, and the run ended with {code}:\n{told}")
            before = finished(run)
            resize = ["mount", "-o", f"remount,size={8 * whole}k", str(run / "results")]
            subprocess.run(resize, check=True)
            code, told = finish(run)
            check(code == 0, told)
            after = finished(run)
            check(all(after[piece] == files for piece, files in before.items()), "finished pieces were written again")
            same(run, expected)
            kept.append(len(before))
    return {"tries": len(sizes), "figure": f"said each time; {min(kept)} to {max(kept)} finished pieces kept"}


def read_only(folder, expected):
    """A folder that can't be written: said by name, nothing changed; writable again, the run goes on."""
    run = make(folder / "run")
    with small_disk(run / "results", 100_000):
        finish(run, stages=("basis",))
        before = results(run)
        subprocess.run(["mount", "-o", "remount,ro", str(run / "results")], check=True)
        code, told = finish(run)
        check(code == 1 and "Read-only" in told and "results" in told, told)
        check(results(run) == before, "something was changed")
        subprocess.run(["mount", "-o", "remount,rw", str(run / "results")], check=True)
        code, told = finish(run)
        check(code == 0, told)
        same(run, expected)
        # What is finished opens where nothing can be written.
        subprocess.run(["mount", "-o", "remount,ro", str(run / "results")], check=True)
        code, told = finish(run, stages=("basis", "projections", "labels"))
        check(code == 0, told)
        same(run, expected)
        subprocess.run(["mount", "-o", "remount,rw", str(run / "results")], check=True)
    return {"tries": 1, "figure": "said by name; went on once it could be written; opened again when it could not"}


def clock_set_back(folder, expected):
    """Files from the future and a clock in 1970: nothing is computed again, and the rest is."""
    run = make(folder / "run")
    finish(run, stages=("basis",))
    for file in (run / "results").rglob("*"):
        os.utime(file, (4e9, 4e9))
    before = finished(run)
    code, told = finish(run, before="clock set back")
    check(code == 0, told)
    after = finished(run)
    check(all(after[piece] == files for piece, files in before.items()), "finished pieces were written again")
    same(run, expected)
    return {"tries": 1, "figure": f"{len(before)} finished pieces kept, the rest computed"}


def older_format(folder, expected):
    """A stage that an older version made: told by status, refused by run, and left as it is."""
    run = make(folder / "run")
    finish(run, stages=("basis",))
    (path,) = (run / "results").glob("basis-*")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    before = results(run)
    code, told = finish(run)
    check(code == 1 and "format_version = 1" in told, told)
    from polca_lib.analysis.status import status

    problems = [row["problem"] for row in status(run / "results")]
    check(any("format 1" in (problem or "") for problem in problems), f"status says {problems}")
    check(results(run) == before, "something was changed")
    return {"tries": 1, "figure": "refused by name, told by status, left as it was"}


def object_store(folder, expected, kills=3, seed=0):
    """Results in an object store that speaks S3 (moto's server), SIGKILL several times: the objects are the files."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**keys, "AWS_ENDPOINT_URL": address}
        session = boto3.session.Session("x", "x", region_name="us-east-1")
        bucket = session.resource("s3", endpoint_url=address).create_bucket(Bucket="bucket")
        run, rng = make(folder / "run"), np.random.default_rng(seed)
        (run / "polca.toml").write_text(SETTINGS.replace('folder = "results"', 'folder = "s3://bucket/results"'))
        for _ in range(kills):
            process = start(run, environment=environment)
            process.join(rng.uniform(2, 6))
            check(process.exitcode is None, f"a process failed, or was done:\n{(run / 'log.txt').read_text()}")
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        code, told = finish(run, environment=environment)
        check(code == 0, told)
        got = {one.key: one.get()["Body"].read() for one in bucket.objects.filter(Prefix="results/")}
        got = {key: content for key, content in got.items() if Path(key).name not in MOVING}
        odd = sorted(key for key in expected.keys() | got.keys() if got.get(key) != expected.get(key))
        check(not odd, f"{len(odd)} objects differ from the files of a run on disk, such as {odd[:3]}")
    finally:
        server.stop()
    return {"tries": kills, "figure": f"{len(got)} objects, byte for byte the files of a run on disk"}


FAULTS = {
    "SIGKILL at random moments": killed,
    "damaged pieces": damaged_pieces,
    "damaged checkpoint": damaged_checkpoint,
    "checkpoint that is not finite": not_finite,
    "two processes on one run": two_processes,
    "disk full": disk_full,
    "folder can't be written": read_only,
    "clock set back": clock_set_back,
    "older format": older_format,
    "results in an object store": object_store,
}
NEED_MOUNT = ("disk full", "folder can't be written")


def main():
    """Do all of them and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--moments", type=int, default=50, help="of SIGKILL")
    moments = parser.parse_args().moments
    from polca_lib.storage.artefacts import software

    with tempfile.TemporaryDirectory() as folder:
        expected, rows = reference(Path(folder) / "reference"), []
        for name, fault in FAULTS.items():
            if name in NEED_MOUNT and not may_mount():
                raise SystemExit(f"{name}: this user may not mount a file system")
            began = time.perf_counter()
            found = fault(
                Path(folder) / name.replace(" ", "-"), expected, **({"moments": moments} if fault is killed else {})
            )
            what = fault.__doc__.strip()
            rows.append({"fault": name, "what": what, **found, "seconds": round(time.perf_counter() - began, 1)})
            print(rows[-1], flush=True)
            shutil.rmtree(Path(folder) / name.replace(" ", "-"))
    place = ROOT / "data" / "faults"
    place.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(place / "faults.csv", index=False)
    about = {name: software()[name] for name in ("commit", "python", "torch", "machine")}
    (place / "provenance.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
