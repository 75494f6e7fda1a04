"""Whole experiments: from a mixture to distilled students and the numbers a report needs, resumable at every stage."""

from flowfast.experiments.digits import digits_mixture as digits_mixture
from flowfast.experiments.digits import digits_settings as digits_settings
from flowfast.experiments.folder import FolderError as FolderError
from flowfast.experiments.job import run_job as run_job
from flowfast.experiments.result import GridResult as GridResult
from flowfast.experiments.result import JobResult as JobResult
from flowfast.experiments.result import TeacherCost as TeacherCost
from flowfast.experiments.sampling import sample_job as sample_job
from flowfast.experiments.settings import Event as Event
from flowfast.experiments.settings import JobSettings as JobSettings

__all__ = [
    "Event",
    "FolderError",
    "GridResult",
    "JobResult",
    "JobSettings",
    "TeacherCost",
    "digits_mixture",
    "digits_settings",
    "run_job",
    "sample_job",
]
