"""The sample field of data with questions about images and no boxes; :mod:`pipeline.loaders.questions` reads it."""

QUESTIONS = "questions.json"
