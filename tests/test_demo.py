"""The demo runs on the pretrained TransNetV2 and its video."""

import re

from qconvert.demo import run_demo


def test_demo_says_what_the_user_sees(capsys):
    said = []
    run_demo(100, said.append)
    assert capsys.readouterr().out.startswith("TransNetV2: 48 Conv3d found, 44 converted")
    assert said[0] == "Looking for cuts in 100 frames, with the float model, the converted one, and that one packed ..."
    assert len(said) == 4
    found = re.fullmatch(r"The float model finds (\d+) cuts; the converted one, .* not trained yet, (\d+)\.", said[1])
    assert found
    assert int(found[1]) > 0
    packed = re.fullmatch(r"Packed, it finds (\d+), and is \d+\.\d x as fast as the float model\.", said[2])
    assert packed
    assert packed[1] == found[2]
