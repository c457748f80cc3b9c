"""Secrets are masked in logs; other text is unchanged."""

import pytest

from pipeline.shards.privacy import masked, masked_value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:hunter2@mlflow:5000", "http://***@mlflow:5000"),
        ("postgresql+psycopg://u:hunter2@db/x", "postgresql+psycopg://***@db/x"),
        ("https://hunter2@github.com/a/b.git", "https://***@github.com/a/b.git"),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=hunter2&v=1",
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=***&v=1",
        ),
        ("https://h/x?AWSAccessKeyId=hunter2", "https://h/x?AWSAccessKeyId=***"),
        ("job.py demo --tracking.password hunter2 --steps 3", "job.py demo --tracking.password *** --steps 3"),
        ("job.py --api-key=hunter2", "job.py --api-key=***"),
        ('{"aws_secret": "hunter2", "a": 1}', '{"aws_secret": "***", "a": 1}'),
        ('{"uri": "http://u:hunter2@h/", "b": "x"}', '{"uri": "http://***@h/", "b": "x"}'),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/folder@00003-abc",
        "s3://bucket@00003-abc",
        "abfs://container@account.dfs.core.windows.net/x",
        "sqlite:////home/me/mlflow.db",
        "me@example.org wrote http://example.org/a",
        '{"tokenizer": "simple", "max_tokens": "77", "design": "b"}',
        "--tokenizer simple --num-tokens 4",
        "https://h/x?design=1&tokens=3",
    ],
)
def test_harmless_text_is_kept(text: str) -> None:
    assert masked(text) == text


def test_settings_with_secret_names_are_masked_where_set() -> None:
    assert masked_value("store.secret_key", "") == ""
    assert masked_value("hub.token", "hunter2") == "***"
    assert masked_value("tokenizer", "simple") == "simple"
    assert masked_value("tokens", 77) == "77"
    assert masked_value("special_token", 3) == "3"
    assert masked_value("aws.secret-access_key", "hunter2") == "***"
