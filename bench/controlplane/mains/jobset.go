// The JobSet controllers as upstream's main starts them, without webhooks and their certificates. It is compiled inside
// upstream's own module; see ../peers.py.
package main

import (
	"flag"

	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	jobset "sigs.k8s.io/jobset/api/jobset/v1alpha2"
	"sigs.k8s.io/jobset/pkg/controllers"
)

func main() {
	flag.Parse()
	ctrl.SetLogger(zap.New())
	scheme := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(scheme))
	utilruntime.Must(jobset.AddToScheme(scheme))
	config := ctrl.GetConfigOrDie()
	config.QPS, config.Burst = 500, 500 // upstream's default
	manager, err := ctrl.NewManager(config, ctrl.Options{Scheme: scheme, Metrics: server.Options{BindAddress: "0"}})
	utilruntime.Must(err)
	ctx := ctrl.SetupSignalHandler()
	utilruntime.Must(controllers.SetupJobSetIndexes(ctx, manager.GetFieldIndexer()))
	utilruntime.Must(controllers.SetupPodIndexes(ctx, manager.GetFieldIndexer()))
	events := manager.GetEventRecorderFor
	utilruntime.Must(controllers.NewJobSetReconciler(manager.GetClient(), scheme, events("jobset")).SetupWithManager(manager))
	utilruntime.Must(controllers.NewPodReconciler(manager.GetClient(), scheme, events("pod")).SetupWithManager(manager))
	utilruntime.Must(manager.Start(ctx))
}
