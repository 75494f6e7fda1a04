"""Sets of exact flow trajectories on disk: made in shards that can be resumed, read through memory maps."""

from flowfast.dataset.generate import generate_dataset as generate_dataset
from flowfast.dataset.teacher_dataset import TeacherDataset as TeacherDataset
