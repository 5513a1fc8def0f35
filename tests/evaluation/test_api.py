from pacatune import evaluation


def test_names():
    assert evaluation.__all__ == [
        "ChoiceQuestion",
        "ChoiceResult",
        "Score",
        "TaskScores",
        "TextScore",
        "default_text",
        "evaluate_choice",
        "evaluate_perplexity",
        "evaluate_tasks",
        "read_questions",
    ]
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
