"""Sets of exact teacher pairs on disk: made in shards that can be resumed, verified, repaired and exported."""

from flowfast.dataset.export import export_dataset as export_dataset
from flowfast.dataset.generate import generate_dataset as generate_dataset
from flowfast.dataset.teacher_dataset import TeacherDataset as TeacherDataset
from flowfast.dataset.verify import Verification as Verification
from flowfast.dataset.verify import verify_dataset as verify_dataset
