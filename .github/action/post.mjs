// After the job's last step: the save of `mode: both`. In other modes there is nothing to do.
import "./main.mjs";
