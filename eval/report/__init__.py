"""A results folder for readers: tables, sentences, figures, as a page, as Markdown, and in TensorBoard."""

from eval.report.sentences import markdown
from eval.report.write import to_tensorboard, write_report

__all__ = ["markdown", "to_tensorboard", "write_report"]
