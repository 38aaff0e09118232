import os

from hypothesis import settings

os.environ["PYTHONWARNINGS"] = "ignore"
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
