"""How tests measure the memory of a script: they run it in a process of its own, after these lines."""

PEAK = '''
def peak():
    """Return the most memory that this process has held so far, in bytes."""
    try:
        # getrusage would begin with the memory of the process that started this one, here that of all tests before
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
'''
