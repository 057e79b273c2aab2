"""Settings of all tests."""

import atexit
import shutil
import tempfile

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

# A test run leaves nothing behind, whoever it runs as: no examples, no directory in the checkout.
settings.register_profile("cleanfs", database=None)
settings.load_profile("cleanfs")
home = tempfile.mkdtemp(prefix="cleanfs-hypothesis-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
set_hypothesis_home_dir(home)
