"""From a request to frames. Each line knows those above it, and none below.

interrupts events                            what must not be cut in two; what is given and told
window_plan wavefront layout                 decide, in integers only
frame_store network capture ranks guidance   what a pass is made of
joining                                      what several videos put together for one forward
denoise                                      one pass: gather, forward, update, commit
tail judges references reflection behind     what comes between passes over the queue, and behind them
seeding                                      how a queue begins
stages                                       which pass comes next
steering progress                            what a run is told while it goes on, and how far it is
decode pump drift session saving stream      frames leave, runs are saved and go on
sharing                                      several videos on one network
run_state session_info                       what a stranger's session file may hold, and what it tells
"""
