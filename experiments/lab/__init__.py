"""What an experiment is written with: trials, claims, statistics, timings and figures.

Trial, Claim, Measured         what `run` yields, what the paper says, what the rows say
lowest, highest, furthest      of several numbers the one that a claim about all of them is judged by
NotEnoughRows                  raised by a claim's `measure` where the rows cannot answer
mean_interval, median_interval, paired_difference, ratio_interval, standard_error
auc, delong, select_best
compare, interleave, Timing    times of functions, taken in turns
new_figure                     a figure in the house style
"""

from experiments.lab.claims import Claim as Claim
from experiments.lab.claims import Measured as Measured
from experiments.lab.claims import furthest as furthest
from experiments.lab.claims import highest as highest
from experiments.lab.claims import lowest as lowest
from experiments.lab.errors import NotEnoughRows as NotEnoughRows
from experiments.lab.errors import UserError as UserError
from experiments.lab.figures import new_figure as new_figure
from experiments.lab.statistics import AucDifference as AucDifference
from experiments.lab.statistics import auc as auc
from experiments.lab.statistics import delong as delong
from experiments.lab.statistics import mean_interval as mean_interval
from experiments.lab.statistics import median_interval as median_interval
from experiments.lab.statistics import paired_difference as paired_difference
from experiments.lab.statistics import ratio_interval as ratio_interval
from experiments.lab.statistics import select_best as select_best
from experiments.lab.statistics import standard_error as standard_error
from experiments.lab.timing import Timing as Timing
from experiments.lab.timing import compare as compare
from experiments.lab.timing import interleave as interleave
from experiments.lab.trial import Row as Row
from experiments.lab.trial import Scalar as Scalar
from experiments.lab.trial import Trial as Trial
