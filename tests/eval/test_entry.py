import pytest

from eval.entry import stoppable


def test_ctrl_c_ends_a_script_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, stoppable("go on"):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "stopped; go on\n"
