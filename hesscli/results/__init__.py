"""What every command returns: frozen dataclasses whose field names are the JSON keys.

No torch and no numpy here: pictures, tables and documents are made from these alone.
A number that is not known is None (JSON null), never NaN.
"""

from hesscli.results.check import (
    Check,
    CheckResult,
    CheckState,
    Plan,
    PlannedCommand,
    Preflight,
)
from hesscli.results.diag import (
    BlockReport,
    DiagonalReport,
    DiagResult,
    Entry,
    EntrySummary,
    Histogram,
    LayerDiagonal,
    Quantile,
)
from hesscli.results.header import (
    SCHEMA_VERSION,
    Answer,
    CheckpointReport,
    Cost,
    DataReport,
    Environment,
    Estimate,
    Header,
    Interval,
    Layer,
    LayerTrace,
    MethodReport,
    Observe,
    ParameterReport,
    ProblemReport,
    Reduction,
    Snapshot,
    Status,
    documented,
    tell,
)
from hesscli.results.ihvp import (
    HOLDS_WITHIN,
    LARGE_RESIDUAL,
    LOW_LEVERAGE,
    DampingPoint,
    IhvpResult,
    LayerSensitivity,
    Perturbation,
    RankingReport,
    Refinement,
    ResidualReport,
    SaliencyReport,
    ScaledChange,
    SolveReport,
    WindowReport,
)
from hesscli.results.prune import (
    LayerPruned,
    PrunedBy,
    PrunedQuality,
    PruneResult,
    PruningMethod,
    Quality,
    Sparsity,
)
from hesscli.results.spectrum import (
    Condition,
    ConvergencePoint,
    DenseSpectrum,
    Eigenvalue,
    LayerSpectrum,
    Outliers,
    SpectralDensity,
    SpectralFunction,
    SpectralFunctions,
    SpectrumResult,
)
from hesscli.results.symmetry import (
    Charge,
    Drift,
    FlatReport,
    LayerSymmetry,
    Orbit,
    OrbitPoint,
    SymmetryFamily,
    SymmetryResult,
)
from hesscli.results.trace import TraceResult
