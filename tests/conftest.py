"""Settings of all tests."""

import atexit
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

# A test run leaves nothing behind, whoever it runs as: no examples, no directory in the checkout.
# And none fails because the machine had other things to do.
settings.register_profile(
    "cleanfs", database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cleanfs")
home = tempfile.mkdtemp(prefix="cleanfs-hypothesis-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
set_hypothesis_home_dir(home)
