"""Errors of grading."""

from steering.language.errors import InvalidRequest, TrimtabError


class GraderUnusable(InvalidRequest):
    """A grader whose options mean nothing, or that needs what the caller does not have."""

    code = "grader_unusable"


class JudgeFailed(TrimtabError):
    """The model that was asked to judge did not answer, or not with a verdict. Nothing was graded."""

    code = "judge_failed"
