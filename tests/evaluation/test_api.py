from pacatune import evaluation


def test_names():
    assert evaluation.__all__ == [
        "ChoiceQuestion",
        "ChoiceResult",
        "MmluData",
        "MmluResult",
        "Score",
        "TaskScores",
        "TextScore",
        "bundled_mmlu",
        "default_text",
        "evaluate_choice",
        "evaluate_mmlu",
        "evaluate_perplexity",
        "evaluate_tasks",
        "read_mmlu",
        "read_questions",
        "write_tasks",
    ]
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
