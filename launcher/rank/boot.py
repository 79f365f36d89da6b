# The first file a rank's interpreter runs: `python -u .../boot.py script SCRIPT ARGS`. It becomes the user's script:
# the shim beside it clears this very namespace and runs the script in it, so that `__main__`, pickling of classes in
# it and multiprocessing see what a plain start would show. Only names of that sort may be bound here.
# The folder of this file is put on the path for the shim (PYTHONSAFEPATH keeps the interpreter from doing so).
__import__("sys").path.insert(0, __file__[: -len("/boot.py")])
try:
    __import__("_launcher_shim").run(globals())
except BaseException as error:  # every exception goes on unchanged, less the frames that are not the user's
    error.__traceback__ = __import__("_launcher_shim").strip(error.__traceback__)
    raise
