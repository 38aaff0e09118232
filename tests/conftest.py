import os
import signal

from hypothesis import settings

os.environ["PYTHONWARNINGS"] = "ignore"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would have it ignored, its children too
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
